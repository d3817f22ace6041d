#include "focal_attention.hpp"

#include <cmath>
#include <numeric>
#include <stdexcept>

namespace fna {
namespace {

constexpr float FAR_BELOW = -1e30f;       // as in fna/focal_keys.py: keys that are there to fill a list up
constexpr float MASKED_SCORE = 16384.0f;  // as in fna/special_tokens.py
constexpr Layout HEADS_FIRST{};

void need(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
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

FocalCall::FocalCall(const Sizes& sizes, const FocalInputs& inputs, const Instructions& instructions)
    : sizes_(sizes), inputs_(inputs), attend_(instructions.attend) {
  const std::int32_t prefix = inputs.prefix_tokens, patches = sizes.tokens - prefix;
  const std::size_t queries = static_cast<std::size_t>(inputs.tiles) * inputs.queries_each;
  const std::size_t keys = static_cast<std::size_t>(inputs.tiles) * inputs.keys_each;
  need(prefix >= 0 && patches >= 0, "prefix_tokens is not between 0 and the number of tokens");
  need(inputs.hot >= 0 && inputs.hot <= patches, "hot is not between 0 and the number of patches");
  need(!any_outside(inputs.tile_queries, queries, sizes.tokens), "tile_queries names a token that is not there");
  need(!any_outside(inputs.tile_keys, keys, sizes.tokens), "tile_keys names a token that is not there");
  need(!any_outside(inputs.places, patches, static_cast<std::int32_t>(queries)), "places names a query that no tile has");

  // Only what `places` asks for is computed: tiles at the edge have fewer queries than the list has room for.
  first_query_.assign(inputs.tiles + 1, 0);
  for (std::int32_t patch = 0; patch < patches; patch++) first_query_[inputs.places[patch] / inputs.queries_each + 1]++;
  std::partial_sum(first_query_.begin(), first_query_.end(), first_query_.begin());
  query_tokens_.resize(patches);
  out_tokens_.resize(patches);
  std::vector<std::int32_t> next(first_query_.begin(), first_query_.end() - 1);
  for (std::int32_t patch = 0; patch < patches; patch++) {
    const std::int32_t at = next[inputs.places[patch] / inputs.queries_each]++;
    query_tokens_[at] = inputs.tile_queries[inputs.places[patch]];
    out_tokens_[at] = prefix + patch;
  }
  prefix_.resize(prefix);
  std::iota(prefix_.begin(), prefix_.end(), 0);
  if (inputs.hot > 0) {
    hot_tokens_.resize(sizes.pairs() * inputs.hot);
    is_hot_.assign(sizes.pairs() * sizes.tokens, 0);
  }
}

// The patches whose keys score highest against the mean patch query, of one image and head.
void FocalCall::choose(std::size_t pair) {
  const Rows query = inputs_.query_layout.rows(inputs_.query, pair, sizes_), key = HEADS_FIRST.rows(inputs_.key, pair, sizes_);
  const std::int32_t first = inputs_.prefix_tokens, patches = sizes_.tokens - first;
  std::vector<float> mean(sizes_.head_size, 0.0f), scores(sizes_.tokens);
  for (std::int32_t token = first; token < sizes_.tokens; token++) {
    for (std::int32_t channel = 0; channel < sizes_.head_size; channel++) mean[channel] += query.first[token * query.step + channel];
  }
  for (float& number : mean) number *= inputs_.scale / static_cast<float>(patches);
  for (std::int32_t token = first; token < sizes_.tokens; token++) {
    const float score = product(mean.data(), key.first + token * key.step, sizes_.head_size) - taken_off(pair, token);
    scores[token] = score == score ? score : -INFINITY;  // NaN has no place in an order
  }
  std::vector<std::int32_t> order(patches);
  std::iota(order.begin(), order.end(), first);
  std::partial_sort(order.begin(), order.begin() + inputs_.hot, order.end(), [&scores](std::int32_t left, std::int32_t right) {
    return scores[left] > scores[right] || (scores[left] == scores[right] && left < right);
  });
  std::copy_n(order.begin(), inputs_.hot, hot_tokens_.begin() + pair * inputs_.hot);
  for (std::int32_t at = 0; at < inputs_.hot; at++) is_hot_[pair * sizes_.tokens + order[at]] = 1;
}

// A step is a tile of one image and head; the prefix is a tile more, whose queries see every key.
void FocalCall::run(std::size_t step, float* out) const {
  const std::size_t pair = step / tiles_and_prefix();
  const std::int32_t tile = static_cast<std::int32_t>(step % tiles_and_prefix());
  const bool of_prefix = tile == inputs_.tiles;

  struct Lists {
    std::vector<std::int32_t> tokens;
    std::vector<float> bias;
    AlignedFloats scratch;
  };
  thread_local Lists lists;
  lists.tokens.clear();
  lists.bias.clear();
  const auto list = [&](std::int32_t token, float bias) {
    lists.tokens.push_back(token);
    lists.bias.push_back(bias - taken_off(pair, token));
  };
  if (of_prefix) {
    for (std::int32_t token = 0; token < sizes_.tokens; token++) list(token, 0.0f);
  } else {
    const std::size_t first = static_cast<std::size_t>(tile) * inputs_.keys_each;
    for (std::size_t at = first; at < first + inputs_.keys_each; at++) {
      const std::int32_t token = inputs_.tile_keys[at];
      const bool listed_as_hot = inputs_.hot > 0 && is_hot_[pair * sizes_.tokens + token] != 0;
      if (inputs_.tile_bias[at] > FAR_BELOW / 2 && !listed_as_hot) list(token, inputs_.tile_bias[at]);
    }
    for (std::int32_t at = 0; at < inputs_.hot; at++) list(hot_tokens_[pair * inputs_.hot + at], 0.0f);
  }

  const std::int32_t first = of_prefix ? 0 : first_query_[tile];
  Tile call{};
  call.query = inputs_.query_layout.rows(inputs_.query, pair, sizes_);
  call.key = HEADS_FIRST.rows(inputs_.key, pair, sizes_);
  call.value = HEADS_FIRST.rows(inputs_.value, pair, sizes_);
  call.out = out + inputs_.out_layout.start(pair, sizes_);
  call.out_step = inputs_.out_layout.step(sizes_);
  call.query_tokens = of_prefix ? prefix_.data() : query_tokens_.data() + first;
  call.out_tokens = of_prefix ? prefix_.data() : out_tokens_.data() + first;
  call.queries = of_prefix ? inputs_.prefix_tokens : first_query_[tile + 1] - first;
  call.key_tokens = call.value_tokens = lists.tokens.data();
  call.key_bias = lists.bias.data();
  call.keys = static_cast<std::int32_t>(lists.tokens.size());
  call.key_size = call.value_size = sizes_.head_size;
  call.scale = inputs_.scale;
  if (call.queries > 0) attend_(call, lists.scratch.get(scratch_floats(call)));
}

float FocalCall::taken_off(std::size_t pair, std::int32_t token) const {
  if (inputs_.key_mask == nullptr) return 0.0f;
  const std::size_t row = inputs_.mask_rows == 1 ? 0 : pair / sizes_.heads;
  return inputs_.key_mask[row * sizes_.tokens + token] != 0 ? MASKED_SCORE : 0.0f;
}

}  // namespace fna
