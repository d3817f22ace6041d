// Focal attention of whole tensors, in steps that may run at once: fna.focal.focal_attention_reference in C++.
#pragma once

#include <cstdint>
#include <vector>

#include "tensors.hpp"

namespace fna {

struct FocalInputs {
  const float *query, *key, *value;
  const std::int32_t* tile_queries;  // [tiles, queries_each]
  const std::int32_t* tile_keys;     // [tiles, keys_each]
  const float* tile_bias;            // [tiles, keys_each]
  const std::int32_t* places;        // [tokens - prefix_tokens]
  const std::int32_t* key_mask;      // [mask_rows, tokens], or null
  std::int32_t tiles, queries_each, keys_each, mask_rows;
  std::int32_t prefix_tokens, hot;
  float scale;
  Layout query_layout, out_layout;  // keys and values have heads first: read again and again, they are better close together
};

class FocalCall {
 public:
  // Throws std::invalid_argument where the lists do not fit.
  FocalCall(const Sizes& sizes, const FocalInputs& inputs, const Instructions& instructions);

  std::size_t choosing_steps() const { return inputs_.hot > 0 ? sizes_.pairs() : 0; }  // to be run before the others
  void choose(std::size_t step);
  std::size_t steps() const { return sizes_.pairs() * tiles_and_prefix(); }
  void run(std::size_t step, float* out) const;

 private:
  std::size_t tiles_and_prefix() const { return inputs_.tiles + (inputs_.prefix_tokens > 0 ? 1 : 0); }
  float taken_off(std::size_t pair, std::int32_t token) const;

  Sizes sizes_;
  FocalInputs inputs_;
  AttendTile attend_;
  std::vector<std::int32_t> first_query_;  // of each tile, in the two lists
  std::vector<std::int32_t> query_tokens_, out_tokens_;
  std::vector<std::int32_t> prefix_;
  std::vector<std::int32_t> hot_tokens_;  // [pairs, hot]
  std::vector<char> is_hot_;              // [pairs, tokens]
};

}  // namespace fna
