// Fast Nystrom Attention of whole tensors, in steps that may run at once: fna.attention.nystrom_attention_reference in C++.
#pragma once

#include <cstdint>
#include <vector>

#include "tensors.hpp"

namespace fna {

struct NystromInputs {
  const float *query, *key, *value;
  const std::int32_t* landmarks;  // [landmark_rows, count]
  const float* landmark_bias;     // [bias_rows, count]
  std::int32_t count, landmark_rows, bias_rows;
  float scale;
  std::int32_t iterations;            // of Newton-Schulz
  std::vector<float> alphas, betas;   // of Chebyshev steps, instead of iterations; none otherwise
  bool exact_rows;
  Layout query_layout, out_layout;
};

class NystromCall {
 public:
  // Throws std::invalid_argument where the landmarks do not fit.
  NystromCall(const Sizes& sizes, const NystromInputs& inputs, const Instructions& instructions);

  // Three kinds of steps, one after the other: what the landmarks attend to, the core, and all queries.
  std::size_t landmark_steps() const;
  void attend_from_landmarks(std::size_t step);
  std::size_t core_steps() const { return sizes_.pairs(); }
  void project(std::size_t pair);
  std::size_t query_steps() const;
  void attend_to_landmarks(std::size_t step, float* out) const;

 private:
  const std::int32_t* landmarks(std::size_t pair) const;
  const float* bias(std::size_t pair) const;
  Tile tile(std::size_t pair) const;
  void newton_schulz(const float* core, float* exact, float* projected) const;
  void chebyshev(const float* core, const float* exact, std::size_t pair, float* projected) const;

  Sizes sizes_;
  NystromInputs inputs_;
  Instructions instructions_;
  std::int32_t side_, width_;  // of the core and of its values, both a multiple of COLUMNS
  std::vector<std::int32_t> every_token_;
  std::vector<float> no_bias_;
  std::vector<float> exact_, projected_;  // [pairs, count, width_]
};

}  // namespace fna
