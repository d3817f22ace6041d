#include "focal_attention.hpp"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace fna {
namespace {

constexpr float FAR_BELOW = -1e30f;       // as in fna/focal_keys.py: keys that are there to fill a list up
constexpr Layout HEADS_FIRST{false};
constexpr float MASKED_SCORE = 16384.0f;  // as in fna/special_tokens.py

// Memory of a thread for one step, kept for the next.
struct Scratch {
  std::vector<std::int32_t> tokens;
  std::vector<float> bias, floats;

  float* aligned(std::size_t count) {
    constexpr std::size_t LINE = 64;
    floats.resize(std::max(floats.size(), count + LINE / sizeof(float)));
    const auto address = reinterpret_cast<std::uintptr_t>(floats.data());
    return reinterpret_cast<float*>((address + LINE - 1) / LINE * LINE);
  }
};

bool outside(const std::int32_t* tokens, std::size_t count, std::int32_t end) {
  return std::any_of(tokens, tokens + count, [end](std::int32_t token) { return token < 0 || token >= end; });
}

float product(const float* left, const float* right, std::int32_t size) {
  constexpr int PARTS = 8;  // added up apart, which the compiler may do at once
  float sums[PARTS] = {};
  std::int32_t at = 0;
  for (; at + PARTS <= size; at += PARTS) {
    for (int part = 0; part < PARTS; part++) sums[part] += left[at + part] * right[at + part];
  }
  for (; at < size; at++) sums[0] += left[at] * right[at];
  return std::accumulate(sums, sums + PARTS, 0.0f);
}

}  // namespace

FocalCall::FocalCall(const FocalSizes& sizes, const FocalInputs& inputs, float scale, Layout query, Layout out, AttendTile attend)
    : sizes_(sizes), inputs_(inputs), scale_(scale), query_(query), out_(out), attend_(attend) {
  const std::int32_t patches = sizes.tokens - sizes.prefix_tokens;
  const std::size_t slots = static_cast<std::size_t>(sizes.tiles) * sizes.tile_queries;
  const std::size_t listed = static_cast<std::size_t>(sizes.tiles) * sizes.tile_keys;
  if (sizes.prefix_tokens < 0 || patches < 0) wrong_ = "prefix_tokens is not between 0 and the number of tokens";
  else if (sizes.hot < 0 || sizes.hot > patches) wrong_ = "hot is not between 0 and the number of patches";
  else if (outside(inputs.tile_queries, slots, sizes.tokens)) wrong_ = "tile_queries names a token that is not there";
  else if (outside(inputs.tile_keys, listed, sizes.tokens)) wrong_ = "tile_keys names a token that is not there";
  else if (outside(inputs.places, patches, static_cast<std::int32_t>(slots))) wrong_ = "places names a query that no tile has";
  if (wrong_ != nullptr) return;

  // Only what `places` asks for is computed: tiles at the edge have fewer queries than the list has room for.
  first_slot_.assign(sizes.tiles + 1, 0);
  for (std::int32_t patch = 0; patch < patches; patch++) first_slot_[inputs.places[patch] / sizes.tile_queries + 1]++;
  std::partial_sum(first_slot_.begin(), first_slot_.end(), first_slot_.begin());
  query_tokens_.resize(patches);
  out_tokens_.resize(patches);
  std::vector<std::int32_t> next(first_slot_.begin(), first_slot_.end() - 1);
  for (std::int32_t patch = 0; patch < patches; patch++) {
    const std::int32_t slot = next[inputs.places[patch] / sizes.tile_queries]++;
    query_tokens_[slot] = inputs.tile_queries[inputs.places[patch]];
    out_tokens_[slot] = sizes.prefix_tokens + patch;
  }
  if (sizes.hot > 0) {
    const std::size_t pairs = static_cast<std::size_t>(sizes.batch) * sizes.heads;
    hot_tokens_.resize(pairs * sizes.hot);
    is_hot_.assign(pairs * sizes.tokens, 0);
  }
}

std::size_t FocalCall::choosing_steps() const {
  return sizes_.hot > 0 ? static_cast<std::size_t>(sizes_.batch) * sizes_.heads : 0;
}

// The patches whose keys score highest against the mean patch query, of one image and head.
void FocalCall::choose(std::size_t step) {
  const std::size_t image = step / sizes_.heads, head = step % sizes_.heads;
  const Rows query = rows(inputs_.query, query_, image, head), key = rows(inputs_.key, HEADS_FIRST, image, head);
  const std::int32_t patches = sizes_.tokens - sizes_.prefix_tokens;
  std::vector<float> mean(sizes_.head_size, 0.0f), scores(sizes_.tokens);
  for (std::int32_t token = sizes_.prefix_tokens; token < sizes_.tokens; token++) {
    for (std::int32_t channel = 0; channel < sizes_.head_size; channel++) mean[channel] += query.first[token * query.step + channel];
  }
  for (float& number : mean) number *= scale_ / static_cast<float>(patches);
  for (std::int32_t token = sizes_.prefix_tokens; token < sizes_.tokens; token++) {
    scores[token] = product(mean.data(), key.first + token * key.step, sizes_.head_size) - taken_off(image, token);
  }
  std::vector<std::int32_t> order(patches);
  std::iota(order.begin(), order.end(), sizes_.prefix_tokens);
  std::partial_sort(order.begin(), order.begin() + sizes_.hot, order.end(), [&scores](std::int32_t left, std::int32_t right) {
    return scores[left] > scores[right] || (scores[left] == scores[right] && left < right);
  });
  std::copy_n(order.begin(), sizes_.hot, hot_tokens_.begin() + step * sizes_.hot);
  for (std::int32_t at = 0; at < sizes_.hot; at++) is_hot_[step * sizes_.tokens + order[at]] = 1;
}

// A step is a tile of one image and head; the prefix is a tile more, whose queries see every key.
std::size_t FocalCall::steps() const {
  return static_cast<std::size_t>(sizes_.batch) * sizes_.heads * (sizes_.tiles + (sizes_.prefix_tokens > 0 ? 1 : 0));
}

void FocalCall::run(std::size_t step, float* out) {
  const std::size_t per_head = sizes_.tiles + (sizes_.prefix_tokens > 0 ? 1 : 0);
  const std::size_t pair = step / per_head, image = pair / sizes_.heads, head = pair % sizes_.heads;
  const std::int32_t tile = static_cast<std::int32_t>(step % per_head);
  const bool of_prefix = tile == sizes_.tiles;

  thread_local Scratch scratch;
  scratch.tokens.clear();
  scratch.bias.clear();
  const auto list = [&](std::int32_t token, float bias) {
    scratch.tokens.push_back(token);
    scratch.bias.push_back(bias - taken_off(image, token));
  };
  if (of_prefix) {
    for (std::int32_t token = 0; token < sizes_.tokens; token++) list(token, 0.0f);
  } else {
    const std::size_t first = static_cast<std::size_t>(tile) * sizes_.tile_keys;
    for (std::size_t at = first; at < first + sizes_.tile_keys; at++) {
      const std::int32_t token = inputs_.tile_keys[at];
      const bool elsewhere = sizes_.hot > 0 && is_hot_[pair * sizes_.tokens + token] != 0;
      if (inputs_.tile_bias[at] > FAR_BELOW / 2 && !elsewhere) list(token, inputs_.tile_bias[at]);
    }
    for (std::int32_t at = 0; at < sizes_.hot; at++) list(hot_tokens_[pair * sizes_.hot + at], 0.0f);
  }

  std::vector<std::int32_t> prefix;
  Tile call{};
  call.query = rows(inputs_.query, query_, image, head);
  call.key = rows(inputs_.key, HEADS_FIRST, image, head);
  call.value = rows(inputs_.value, HEADS_FIRST, image, head);
  call.out = out + out_.start(image, head, sizes_.heads, sizes_.tokens, sizes_.head_size);
  call.out_step = out_.step(sizes_.heads, sizes_.head_size);
  if (of_prefix) {
    prefix.resize(sizes_.prefix_tokens);
    std::iota(prefix.begin(), prefix.end(), 0);
    call.query_tokens = call.out_tokens = prefix.data();
    call.queries = sizes_.prefix_tokens;
  } else {
    call.query_tokens = query_tokens_.data() + first_slot_[tile];
    call.out_tokens = out_tokens_.data() + first_slot_[tile];
    call.queries = first_slot_[tile + 1] - first_slot_[tile];
  }
  if (call.queries == 0) return;
  call.key_tokens = scratch.tokens.data();
  call.key_bias = scratch.bias.data();
  call.keys = static_cast<std::int32_t>(scratch.tokens.size());
  call.head_size = sizes_.head_size;
  call.scale = scale_;
  attend_(call, scratch.aligned(scratch_floats(scratch.tokens.size(), sizes_.head_size)));
}

Rows FocalCall::rows(const float* tensor, Layout layout, std::size_t image, std::size_t head) const {
  const float* first = tensor + layout.start(image, head, sizes_.heads, sizes_.tokens, sizes_.head_size);
  return {first, layout.step(sizes_.heads, sizes_.head_size)};
}

float FocalCall::taken_off(std::size_t image, std::int32_t token) const {
  if (inputs_.key_mask == nullptr) return 0.0f;
  const std::size_t row = inputs_.mask_rows == 1 ? 0 : image;
  return inputs_.key_mask[row * sizes_.tokens + token] != 0 ? MASKED_SCORE : 0.0f;
}

}  // namespace fna
