// Compiled once for each kind of instructions, with FNA_KIND (a namespace of tiles.hpp) and FNA_LANES (floats of a register).
//
// Queries lie across the lanes, keys and values are read where they are, one number at a time for all lanes. So nothing is gathered,
// and the softmax never adds across lanes. Only what is in this file may be inlined here: a standard function compiled for AVX-512
// could be the copy that the linker keeps for processors without.
#include "tiles.hpp"

#include <cmath>
#include <cstring>
#include <utility>

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

// Of two registers, the lanes in which bit STEP of their number is 0 from the first and the others from the second, exchanged.
template <int STEP, int... LANE>
inline void exchange(Floats& first, Floats& second, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  const Floats low = __builtin_shufflevector(first, second, (LANE & STEP ? LANES + (LANE ^ STEP) : LANE)...);
  second = __builtin_shufflevector(first, second, (LANE & STEP ? LANES + LANE : LANE ^ STEP)...);
#else
  const Floats low = __builtin_shuffle(first, second, Ints{(LANE & STEP ? LANES + (LANE ^ STEP) : LANE)...});
  second = __builtin_shuffle(first, second, Ints{(LANE & STEP ? LANES + LANE : LANE ^ STEP)...});
#endif
  first = low;
}

template <int STEP>
inline void turn_by(Floats* square) {
#pragma GCC unroll 16
  for (int row = 0; row < LANES; row++) {
    if ((row & STEP) == 0) exchange<STEP>(square[row], square[row + STEP], std::make_integer_sequence<int, LANES>());
  }
  if constexpr (STEP > 1) turn_by<STEP / 2>(square);
}

// Rows become columns.
inline void turn(Floats* square) { turn_by<LANES / 2>(square); }

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
  for (int channel = 0; channel < tile.key_size; channel++) {
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
    const float* value = tile.value.first + static_cast<std::size_t>(tile.value_tokens[key]) * tile.value.step + channel;
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

inline const float* query_row(const Tile& tile, int at) {
  return tile.query.first + static_cast<std::size_t>(tile.query_tokens[at]) * tile.query.step;
}

// Lays queries across the lanes, scaled: [key_size][WIDTH]. Lanes without one repeat the first.
template <int WIDTH>
inline void turn_queries(const Tile& tile, int first, int queries, float* turned) {
  for (int lane = 0; lane < WIDTH; lane += LANES) {
    const float* rows[LANES];
    for (int at = 0; at < LANES; at++) rows[at] = query_row(tile, first + (lane + at < queries ? lane + at : 0));
    int channel = 0;
    for (; channel + LANES <= tile.key_size; channel += LANES) {
      Floats square[LANES];
#pragma GCC unroll 16
      for (int at = 0; at < LANES; at++) square[at] = load(rows[at] + channel) * tile.scale;
      turn(square);
#pragma GCC unroll 16
      for (int at = 0; at < LANES; at++) store(turned + (channel + at) * WIDTH + lane, square[at]);
    }
    for (; channel < tile.key_size; channel++) {
      for (int at = 0; at < LANES; at++) turned[channel * WIDTH + lane + at] = rows[at][channel] * tile.scale;
    }
  }
}

// Writes [value_size][WIDTH] times each lane's share where each query's result belongs.
template <int WIDTH>
inline void turn_results(const Tile& tile, int first, int queries, const float* sums, const Floats* shares) {
  for (int lane = 0; lane < queries; lane += LANES) {
    const int count = queries - lane < LANES ? queries - lane : LANES;
    const Floats share = shares[lane / LANES];
    float* rows[LANES];
    for (int at = 0; at < count; at++) rows[at] = tile.out + static_cast<std::size_t>(tile.out_tokens[first + lane + at]) * tile.out_step;
    int channel = 0;
    for (; channel + LANES <= tile.value_size; channel += LANES) {
      Floats square[LANES];
#pragma GCC unroll 16
      for (int at = 0; at < LANES; at++) square[at] = load(sums + (channel + at) * WIDTH + lane) * share;
      turn(square);
      for (int at = 0; at < count; at++) store(rows[at] + channel, square[at]);
    }
    for (; channel < tile.value_size; channel++) {
      for (int at = 0; at < count; at++) rows[at][channel] = sums[channel * WIDTH + lane + at] * share[at];
    }
  }
}

// Queries first to first + queries of the tile; ROWS keys or channels at once, so that all sums stay in registers.
template <int ROWS, int REGISTERS>
void attend_some(const Tile& tile, int first, int queries, float* scratch) {
  constexpr int WIDTH = REGISTERS * LANES;
  const int size = tile.value_size;
  float* turned = scratch;                       // [key_size][WIDTH], queries
  float* sums = turned + tile.key_size * WIDTH;  // [size][WIDTH], results
  float* scores = sums + size * WIDTH;           // [keys][WIDTH]
  turn_queries<WIDTH>(tile, first, queries, turned);

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

  for (int part = 0; part < REGISTERS; part++) total[part] = 1.0f / total[part];
  turn_results<WIDTH>(tile, first, queries, sums, total);
}

void attend_tile(const Tile& tile, float* scratch) {
  int most = 4;
  while (most > 1 && tile.keys * most * LANES > MOST_SCORES) most /= 2;
  for (int first = 0; first < tile.queries; first += most * LANES) {
    const int queries = tile.queries - first < most * LANES ? tile.queries - first : most * LANES;
    switch ((queries + LANES - 1) / LANES) {
      case 1: attend_some<8, 1>(tile, first, queries, scratch); break;
      case 2: attend_some<FNA_REGISTERS == 32 ? 8 : 4, 2>(tile, first, queries, scratch); break;
      case 3: attend_some<FNA_REGISTERS == 32 ? 8 : 4, 3>(tile, first, queries, scratch); break;
      default: attend_some<FNA_REGISTERS == 32 ? 6 : 2, 4>(tile, first, queries, scratch);
    }
  }
}

// ROWS rows of the product, REGISTERS registers of columns.
template <int ROWS, int REGISTERS>
inline void multiply_some(const float* left, const float* right, float* out, int inner, int columns) {
  Floats sums[ROWS][REGISTERS] = {};
  for (int at = 0; at < inner; at++) {
    Floats row[REGISTERS];
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) row[part] = load(right + at * columns + part * LANES);
#pragma GCC unroll 8
    for (int line = 0; line < ROWS; line++) {
      const float number = left[line * inner + at];
#pragma GCC unroll 4
      for (int part = 0; part < REGISTERS; part++) sums[line][part] += number * row[part];
    }
  }
#pragma GCC unroll 8
  for (int line = 0; line < ROWS; line++) {
#pragma GCC unroll 4
    for (int part = 0; part < REGISTERS; part++) store(out + line * columns + part * LANES, sums[line][part]);
  }
}

template <int ROWS>
void multiply_rows(const float* left, const float* right, float* out, int inner, int columns) {
  int column = 0;
  for (; column + 4 * LANES <= columns; column += 4 * LANES) {
    multiply_some<ROWS, 4>(left, right + column, out + column, inner, columns);
  }
  for (; column < columns; column += LANES) multiply_some<ROWS, 1>(left, right + column, out + column, inner, columns);
}

void multiply(const float* left, const float* right, float* out, std::int32_t rows, std::int32_t inner, std::int32_t columns) {
  constexpr int ROWS = FNA_REGISTERS == 32 ? 6 : 2;
  int row = 0;
  for (; row + ROWS <= rows; row += ROWS) multiply_rows<ROWS>(left + row * inner, right, out + row * columns, inner, columns);
  for (; row < rows; row++) multiply_rows<1>(left + row * inner, right, out + row * columns, inner, columns);
}

}  // namespace

const Instructions FNA_KIND::instructions = {attend_tile, multiply};

}  // namespace fna
