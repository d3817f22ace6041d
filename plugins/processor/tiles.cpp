// Compiled once for each kind of instructions, with FNA_KIND (a namespace of tiles.hpp) and FNA_LANES (floats of a register).
//
// Queries lie across the lanes, keys and values are read where they are, one number at a time for all lanes. So nothing is gathered,
// and the softmax never adds across lanes. Only what is in this file may be inlined here: a standard function compiled for AVX-512
// could be the copy that the linker keeps for processors without.
#include "tiles.hpp"

#include <cmath>
#include <cstring>

namespace fna {
namespace {

constexpr int LANES = FNA_LANES;
constexpr int KEYS_AT_ONCE = 32;  // their weights and the result so far stay in the first-level cache

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

inline void store(float* to, Floats floats) { std::memcpy(to, &floats, sizeof floats); }

inline Floats all(float number) { return number - Floats{}; }

inline Floats larger(Floats left, Floats right) { return left > right ? left : right; }

// exp of numbers that are not positive, to 1e-7; below exp(-87) it stays there.
inline Floats exponential(Floats x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction, and lies in its last bits
  x = larger(x, all(-87.0f));
  const Floats shifted = x * 1.44269504f + ROUND;
  const Floats twos = shifted - ROUND;
  const Floats rest = x - twos * 0.693359375f + twos * 2.12194440e-4f;  // ln 2 in two parts, the first exact
  Floats sum = all(1.0f / 720);
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  Ints bits, power;
  std::memcpy(&bits, &sum, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  std::memcpy(&sum, &bits, sizeof sum);
  return sum;
}

// Scores of KEYS keys, and each lane's largest so far.
template <int KEYS, int REGISTERS>
inline void score(const Tile& tile, const float* queries, int first, float* scores, Floats* largest) {
  constexpr int WIDTH = REGISTERS * LANES;
  const float* rows[KEYS];
  Floats sums[KEYS][REGISTERS];
#pragma GCC unroll 8
  for (int key = 0; key < KEYS; key++) {
    rows[key] = tile.key.first + static_cast<std::size_t>(tile.key_tokens[first + key]) * tile.key.step;
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) sums[key][part] = all(tile.key_bias[first + key]);
  }
  for (int channel = 0; channel < tile.head_size; channel++) {
    Floats query[REGISTERS];
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) query[part] = load(queries + channel * WIDTH + part * LANES);
#pragma GCC unroll 8
    for (int key = 0; key < KEYS; key++) {
      const float number = rows[key][channel];
#pragma GCC unroll 4
      for (int part = 0; part < REGISTERS; part++) sums[key][part] += number * query[part];
    }
  }
#pragma GCC unroll 8
  for (int key = 0; key < KEYS; key++) {
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) {
      store(scores + (first + key) * WIDTH + part * LANES, sums[key][part]);
      largest[part] = larger(largest[part], sums[key][part]);
    }
  }
}

// Adds weighted values to CHANNELS channels of the result.
template <int CHANNELS, int REGISTERS>
inline void mix(const Tile& tile, const float* weights, int first, int keys, int channel, float* sums) {
  constexpr int WIDTH = REGISTERS * LANES;
  Floats held[CHANNELS][REGISTERS];
#pragma GCC unroll 8
  for (int row = 0; row < CHANNELS; row++) {
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) held[row][part] = load(sums + (channel + row) * WIDTH + part * LANES);
  }
  for (int key = first; key < first + keys; key++) {
    const float* value = tile.value.first + static_cast<std::size_t>(tile.key_tokens[key]) * tile.value.step + channel;
    Floats weight[REGISTERS];
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) weight[part] = load(weights + key * WIDTH + part * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < CHANNELS; row++) {
      const float number = value[row];
#pragma GCC unroll 4
      for (int part = 0; part < REGISTERS; part++) held[row][part] += number * weight[part];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < CHANNELS; row++) {
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) store(sums + (channel + row) * WIDTH + part * LANES, held[row][part]);
  }
}

// Queries first to first + queries of the tile; ROWS keys or channels at once, so that all sums stay in registers.
template <int ROWS, int REGISTERS>
void attend_some(const Tile& tile, int first, int queries, float* scratch) {
  constexpr int WIDTH = REGISTERS * LANES;
  const int size = tile.head_size;
  float* turned = scratch;            // [size][WIDTH], queries
  float* sums = turned + size * WIDTH;  // [size][WIDTH], results
  float* scores = sums + size * WIDTH;  // [keys][WIDTH]
  for (int lane = 0; lane < WIDTH; lane++) {
    const int token = tile.query_tokens[first + (lane < queries ? lane : 0)];
    const float* row = tile.query.first + static_cast<std::size_t>(token) * tile.query.step;
    for (int channel = 0; channel < size; channel++) turned[channel * WIDTH + lane] = row[channel] * tile.scale;
  }

  Floats largest[REGISTERS], total[REGISTERS];
  for (int part = 0; part < REGISTERS; part++) largest[part] = all(-INFINITY), total[part] = all(0.0f);
  int key = 0;
  for (; key + ROWS <= tile.keys; key += ROWS) score<ROWS, REGISTERS>(tile, turned, key, scores, largest);
  for (; key < tile.keys; key++) score<1, REGISTERS>(tile, turned, key, scores, largest);

  std::memset(sums, 0, sizeof(float) * size * WIDTH);
  for (int start = 0; start < tile.keys; start += KEYS_AT_ONCE) {
    const int keys = tile.keys - start < KEYS_AT_ONCE ? tile.keys - start : KEYS_AT_ONCE;
    for (int at = start; at < start + keys; at++) {
#pragma GCC unroll 4
      for (int part = 0; part < REGISTERS; part++) {
        float* place = scores + at * WIDTH + part * LANES;
        const Floats weight = exponential(load(place) - largest[part]);
        total[part] += weight;
        store(place, weight);
      }
    }
    int channel = 0;
    for (; channel + ROWS <= size; channel += ROWS) mix<ROWS, REGISTERS>(tile, scores, start, keys, channel, sums);
    for (; channel + 4 <= size; channel += 4) mix<4, REGISTERS>(tile, scores, start, keys, channel, sums);
    for (; channel < size; channel++) mix<1, REGISTERS>(tile, scores, start, keys, channel, sums);
  }

  float shares[WIDTH];
  for (int part = 0; part < REGISTERS; part++) store(shares + part * LANES, 1.0f / total[part]);
  for (int lane = 0; lane < queries; lane++) {
    float* row = tile.out + static_cast<std::size_t>(tile.out_tokens[first + lane]) * tile.out_step;
    for (int channel = 0; channel < size; channel++) row[channel] = sums[channel * WIDTH + lane] * shares[lane];
  }
}

}  // namespace

void FNA_KIND::attend_tile(const Tile& tile, float* scratch) {
  for (int first = 0; first < tile.queries; first += 4 * LANES) {
    const int queries = tile.queries - first < 4 * LANES ? tile.queries - first : 4 * LANES;
    switch ((queries + LANES - 1) / LANES) {
      case 1: attend_some<8, 1>(tile, first, queries, scratch); break;
      case 2: attend_some<FNA_REGISTERS == 32 ? 8 : 4, 2>(tile, first, queries, scratch); break;
      case 3: attend_some<FNA_REGISTERS == 32 ? 8 : 4, 3>(tile, first, queries, scratch); break;
      default: attend_some<FNA_REGISTERS == 32 ? 6 : 2, 4>(tile, first, queries, scratch);
    }
  }
}

}  // namespace fna
