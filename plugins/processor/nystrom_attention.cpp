#include "nystrom_attention.hpp"

#include <numeric>
#include <stdexcept>

namespace fna {
namespace {

constexpr Layout HEADS_FIRST{};
constexpr std::int32_t LANDMARKS_AT_ONCE = 32;  // of one step
constexpr std::int32_t QUERIES_AT_ONCE = 64;
constexpr float COLUMN_FLOOR = 0.1f;  // as in fna/chebyshev.py

std::int32_t parts(std::int32_t whole, std::int32_t part) { return (whole + part - 1) / part; }

// A square matrix made `factor` times the identity less itself, as far as there are landmarks; the rest stays zero.
void take_from_identity(float* matrix, std::int32_t side, std::int32_t count, float factor) {
  for (std::int32_t row = 0; row < count; row++) {
    for (std::int32_t column = 0; column < count; column++) matrix[row * side + column] = -matrix[row * side + column];
    matrix[row * side + row] += factor;
  }
}

// out = factor * start - out
void take_from(float* out, const float* start, float factor, std::size_t count) {
  for (std::size_t at = 0; at < count; at++) out[at] = factor * start[at] - out[at];
}

}  // namespace

NystromCall::NystromCall(const Sizes& sizes, const NystromInputs& inputs, const Instructions& instructions)
    : sizes_(sizes),
      inputs_(inputs),
      instructions_(instructions),
      side_(parts(inputs.count, COLUMNS) * COLUMNS),
      width_(parts(sizes.head_size, COLUMNS) * COLUMNS),
      every_token_(sizes.tokens),
      no_bias_(sizes.tokens, 0.0f),
      exact_(sizes.pairs() * inputs.count * width_, 0.0f),
      projected_(exact_.size()) {
  const std::size_t listed = static_cast<std::size_t>(inputs.landmark_rows) * inputs.count;
  if (inputs.count < 1 || inputs.count > sizes.tokens) throw std::invalid_argument("there must be 1 to N landmarks");
  if (any_outside(inputs.landmarks, listed, sizes.tokens)) throw std::invalid_argument("landmarks names a token that is not there");
  if (inputs.alphas.empty() && inputs.iterations < 1) throw std::invalid_argument("iterations must be 1 or more");
  std::iota(every_token_.begin(), every_token_.end(), 0);
}

const std::int32_t* NystromCall::landmarks(std::size_t pair) const {
  return inputs_.landmarks + (inputs_.landmark_rows == 1 ? 0 : pair / sizes_.heads * inputs_.count);
}

const float* NystromCall::bias(std::size_t pair) const {
  return inputs_.landmark_bias + (inputs_.bias_rows == 1 ? 0 : pair / sizes_.heads * inputs_.count);
}

// What all three products with a softmax have in common.
Tile NystromCall::tile(std::size_t pair) const {
  Tile call{};
  call.query = inputs_.query_layout.rows(inputs_.query, pair, sizes_);
  call.key = HEADS_FIRST.rows(inputs_.key, pair, sizes_);
  call.key_size = call.value_size = sizes_.head_size;
  call.scale = inputs_.scale;
  return call;
}

std::size_t NystromCall::landmark_steps() const { return sizes_.pairs() * parts(inputs_.count, LANDMARKS_AT_ONCE); }

// Exact attention of some landmarks: Bv.
void NystromCall::attend_from_landmarks(std::size_t step) {
  const std::size_t per_pair = parts(inputs_.count, LANDMARKS_AT_ONCE), pair = step / per_pair;
  const std::int32_t first = static_cast<std::int32_t>(step % per_pair) * LANDMARKS_AT_ONCE;
  Tile call = tile(pair);
  call.value = HEADS_FIRST.rows(inputs_.value, pair, sizes_);
  call.out = exact_.data() + pair * inputs_.count * width_;
  call.out_step = width_;
  call.query_tokens = landmarks(pair) + first;
  call.out_tokens = every_token_.data() + first;
  call.queries = std::min(LANDMARKS_AT_ONCE, inputs_.count - first);
  call.key_tokens = call.value_tokens = every_token_.data();
  call.key_bias = no_bias_.data();
  call.keys = sizes_.tokens;
  thread_local AlignedFloats scratch;
  instructions_.attend(call, scratch.get(scratch_floats(call)));
}

// The core of one image and head: softmax among landmarks, and what stands for its inverse times Bv.
void NystromCall::project(std::size_t pair) {
  const std::int32_t count = inputs_.count;
  const std::size_t square = static_cast<std::size_t>(side_) * side_, rows = static_cast<std::size_t>(side_) * width_;
  thread_local AlignedFloats memory, scratch;
  float* identity = memory.get(2 * square + 2 * rows);
  float *core = identity + square, *exact = core + square, *projected = exact + rows;
  std::fill(identity, projected + rows, 0.0f);
  for (std::int32_t row = 0; row < count; row++) identity[row * side_ + row] = 1.0f;

  Tile call = tile(pair);
  call.value = {identity, static_cast<std::size_t>(side_)};
  call.value_size = count;
  call.out = core;
  call.out_step = side_;
  call.query_tokens = call.key_tokens = landmarks(pair);
  call.out_tokens = call.value_tokens = every_token_.data();
  call.queries = call.keys = count;
  call.key_bias = bias(pair);
  instructions_.attend(call, scratch.get(scratch_floats(call)));

  const std::size_t start = pair * count * width_, filled = static_cast<std::size_t>(count) * width_;
  std::copy_n(exact_.begin() + start, filled, exact);
  if (inputs_.alphas.empty()) newton_schulz(core, exact, projected);
  else chebyshev(core, exact, pair, projected);
  std::copy_n(projected, filled, projected_.begin() + start);
}

// fna.attention.newton_schulz_iterates; `exact` is used up.
void NystromCall::newton_schulz(const float* core, float* exact, float* projected) const {
  const std::int32_t side = side_, count = inputs_.count;
  const std::size_t square = static_cast<std::size_t>(side) * side, rows = static_cast<std::size_t>(side) * width_;
  thread_local AlignedFloats memory;
  float* inverse = memory.get(4 * square + rows);
  float *product = inverse + square, *inner = product + square, *next = inner + square, *vector = next + square;
  float largest = 0.0f;
  for (std::int32_t column = 0; column < count; column++) {
    float sum = 0.0f;
    for (std::int32_t row = 0; row < count; row++) sum += core[row * side + column];
    largest = std::max(largest, sum);
  }
  for (std::int32_t row = 0; row < side; row++) {
    for (std::int32_t column = 0; column < side; column++) inverse[row * side + column] = core[column * side + row] / largest;
  }
  const auto multiply = instructions_.multiply;
  for (std::int32_t step = 1; step < inputs_.iterations; step++) {
    multiply(core, inverse, product, side, side, side);
    std::copy_n(product, square, inner);
    take_from_identity(inner, side, count, 7.0f);
    multiply(product, inner, next, side, side, side);
    take_from_identity(next, side, count, 15.0f);
    multiply(product, next, inner, side, side, side);
    take_from_identity(inner, side, count, 13.0f);
    multiply(inverse, inner, next, side, side, side);
    for (std::size_t at = 0; at < square; at++) inverse[at] = 0.25f * next[at];
  }
  multiply(core, inverse, product, side, side, side);
  multiply(product, exact, vector, side, side, width_);
  take_from(vector, exact, 7.0f, rows);
  multiply(product, vector, projected, side, side, width_);
  take_from(projected, exact, 15.0f, rows);
  multiply(product, projected, vector, side, side, width_);
  take_from(vector, exact, 13.0f, rows);
  multiply(inverse, vector, projected, side, side, width_);
  for (std::size_t at = 0; at < rows; at++) projected[at] *= 0.25f;
}

// fna.attention.chebyshev_core
void NystromCall::chebyshev(const float* core, const float* exact, std::size_t pair, float* projected) const {
  const std::int32_t side = side_, count = inputs_.count, size = sizes_.head_size;
  const std::size_t square = static_cast<std::size_t>(side) * side, rows = static_cast<std::size_t>(side) * width_;
  thread_local AlignedFloats memory;
  float* weighted = memory.get(2 * square + 3 * rows);  // w A^T
  float *normal = weighted + square, *residual = normal + square, *step = residual + rows, *next = step + rows;
  std::fill(weighted, next + rows, 0.0f);
  for (std::int32_t column = 0; column < count; column++) {
    float sum = 0.0f;
    for (std::int32_t row = 0; row < count; row++) sum += core[row * side + column];
    const float weight = 1.0f / std::max(sum, COLUMN_FLOOR);
    for (std::int32_t row = 0; row < count; row++) weighted[column * side + row] = weight * core[row * side + column];
  }
  const auto multiply = instructions_.multiply;
  multiply(weighted, core, normal, side, side, side);

  const Rows value = HEADS_FIRST.rows(inputs_.value, pair, sizes_);
  for (std::int32_t row = 0; row < count; row++) {
    std::copy_n(value.first + landmarks(pair)[row] * value.step, size, projected + row * width_);
  }
  multiply(core, projected, step, side, side, width_);
  take_from(step, exact, 1.0f, rows);
  for (std::int32_t column = 0; column < size; column++) {
    float mean = 0.0f;
    for (std::int32_t row = 0; row < count; row++) mean += step[row * width_ + column];
    mean /= static_cast<float>(count);
    for (std::int32_t row = 0; row < count; row++) {
      step[row * width_ + column] -= mean;
      projected[row * width_ + column] += mean;
    }
  }
  multiply(weighted, step, residual, side, side, width_);
  for (std::size_t at = 0; at < rows; at++) step[at] = inputs_.alphas[0] * residual[at];
  for (std::size_t number = 0;;) {
    for (std::size_t at = 0; at < rows; at++) projected[at] += step[at];
    if (++number == inputs_.alphas.size()) break;
    multiply(normal, step, next, side, side, width_);
    for (std::size_t at = 0; at < rows; at++) {
      residual[at] -= next[at];
      step[at] = inputs_.betas[number] * step[at] + inputs_.alphas[number] * residual[at];
    }
  }
}

std::size_t NystromCall::query_steps() const { return sizes_.pairs() * parts(sizes_.tokens, QUERIES_AT_ONCE); }

// What some queries take from the landmarks.
void NystromCall::attend_to_landmarks(std::size_t step, float* out) const {
  const std::size_t per_pair = parts(sizes_.tokens, QUERIES_AT_ONCE), pair = step / per_pair;
  const std::int32_t first = static_cast<std::int32_t>(step % per_pair) * QUERIES_AT_ONCE;
  const std::size_t start = pair * inputs_.count * width_;
  Tile call = tile(pair);
  call.value = {projected_.data() + start, static_cast<std::size_t>(width_)};
  call.out = out + inputs_.out_layout.start(pair, sizes_);
  call.out_step = inputs_.out_layout.step(sizes_);
  call.query_tokens = call.out_tokens = every_token_.data() + first;
  call.queries = std::min(QUERIES_AT_ONCE, sizes_.tokens - first);
  call.key_tokens = landmarks(pair);
  call.value_tokens = every_token_.data();
  call.key_bias = bias(pair);
  call.keys = inputs_.count;
  thread_local AlignedFloats scratch;
  instructions_.attend(call, scratch.get(scratch_floats(call)));
  if (!inputs_.exact_rows) return;
  for (std::int32_t at = 0; at < inputs_.count; at++) {
    const std::int32_t token = landmarks(pair)[at];
    if (token < first || token >= first + call.queries) continue;
    std::copy_n(exact_.begin() + start + at * width_, sizes_.head_size, call.out + token * call.out_step);
  }
}

}  // namespace fna
