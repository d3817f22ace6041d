// Attention of one tile: some queries over their own list of keys, in one of several kinds of instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fna {

// Rows of one image and head; token i begins at first + i * step.
struct Rows {
  const float* first;
  std::size_t step;
};

struct Tile {
  Rows query, key, value;
  float* out;
  std::size_t out_step;
  const std::int32_t* query_tokens;  // [queries]
  const std::int32_t* out_tokens;    // [queries], where their results go
  std::int32_t queries;
  const std::int32_t* key_tokens;    // [keys]
  const std::int32_t* value_tokens;  // [keys]
  const float* key_bias;             // [keys], added to the scores
  std::int32_t keys;                 // at least 1
  std::int32_t key_size, value_size;
  float scale;
};

// Writes softmax(scale * query . key + bias) . value of the tile's queries; scratch has scratch_floats of it, on 64 bytes.
using AttendTile = void (*)(const Tile& tile, float* scratch);

constexpr std::int32_t MOST_LANES = 64;       // queries at a time
constexpr std::int32_t MOST_SCORES = 1 << 17;  // at a time, so that they stay in the second-level cache; fewer queries, else

constexpr std::size_t scratch_floats(const Tile& tile) {
  return static_cast<std::size_t>(MOST_LANES) * (tile.keys + tile.key_size + tile.value_size);
}

// out = left . right, row by row without gaps; the columns are a multiple of COLUMNS.
using Multiply = void (*)(const float* left, const float* right, float* out, std::int32_t rows, std::int32_t inner, std::int32_t columns);

constexpr std::int32_t COLUMNS = 16;

struct Instructions {
  AttendTile attend;
  Multiply multiply;
};

namespace wide {  // AVX-512
extern const Instructions instructions;
}
namespace middle {  // AVX2 and FMA
extern const Instructions instructions;
}
namespace narrow {  // what every processor of the kind has: SSE2, NEON
extern const Instructions instructions;
}

}  // namespace fna
