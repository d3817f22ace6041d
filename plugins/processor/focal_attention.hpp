// Focal attention of whole tensors, in steps that may run at once: fna.focal.focal_attention_reference in C++.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "tiles.hpp"

namespace fna {

// A tensor of [batch, heads, tokens, head_size], or of [batch, tokens, heads, head_size] where heads come last.
struct Layout {
  bool heads_last;

  std::size_t start(std::size_t image, std::size_t head, std::size_t heads, std::size_t tokens, std::size_t size) const {
    return heads_last ? (image * tokens * heads + head) * size : (image * heads + head) * tokens * size;
  }
  std::size_t step(std::size_t heads, std::size_t size) const { return heads_last ? heads * size : size; }
};

struct FocalSizes {
  std::int32_t batch, heads, tokens, head_size;
  std::int32_t tiles, tile_queries, tile_keys;
  std::int32_t prefix_tokens, hot;
};

struct FocalInputs {
  const float *query, *key, *value;
  const std::int32_t* tile_queries;  // [tiles, tile_queries]
  const std::int32_t* tile_keys;     // [tiles, tile_keys]
  const float* tile_bias;            // [tiles, tile_keys]
  const std::int32_t* places;        // [tokens - prefix_tokens]
  const std::int32_t* key_mask;      // [mask_rows, tokens], or null
  std::int32_t mask_rows;
};

class FocalCall {
 public:
  // Keys and values have their heads first: read again and again, they are better close together.
  // Says what is wrong with the lists by the result of `wrong`, before anything is run.
  FocalCall(const FocalSizes& sizes, const FocalInputs& inputs, float scale, Layout query, Layout out, AttendTile attend);

  const char* wrong() const { return wrong_; }

  std::size_t choosing_steps() const;  // to be run before the others; none without hot keys
  void choose(std::size_t step);
  std::size_t steps() const;
  void run(std::size_t step, float* out);

 private:
  struct Slot {
    std::int32_t query, out;
  };

  Rows rows(const float* tensor, Layout layout, std::size_t image, std::size_t head) const;
  float taken_off(std::size_t image, std::int32_t token) const;

  FocalSizes sizes_;
  FocalInputs inputs_;
  float scale_;
  Layout query_, out_;
  AttendTile attend_;
  const char* wrong_ = nullptr;
  std::vector<std::int32_t> first_slot_;  // of each tile's queries in the two lists
  std::vector<std::int32_t> query_tokens_, out_tokens_;
  std::vector<std::int32_t> hot_tokens_;  // [batch, heads, hot]
  std::vector<char> is_hot_;              // [batch, heads, tokens]
};

}  // namespace fna
