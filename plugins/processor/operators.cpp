// FocalAttention as an operator of onnxruntime's processor: what RegisterCustomOps adds to a session.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "focal_attention.hpp"
#include "onnxruntime_interface.hpp"

namespace fna {
namespace {

using namespace onnxruntime;

enum Input { QUERY, KEY, VALUE, TILE_QUERIES, TILE_KEYS, TILE_BIAS, PLACES, KEY_MASK, INPUTS };

// An error of onnxruntime's own, passed on as it is.
struct Failed {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failed{status};
}

// The fastest kind of instructions that this processor has, or FNA_INSTRUCTIONS=narrow, middle, for tests.
AttendTile choose_attend() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("FNA_INSTRUCTIONS");
  const std::string most = wanted == nullptr ? "wide" : wanted;
  __builtin_cpu_init();
  if (most == "wide" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return wide::attend_tile;
  if (most != "narrow" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return middle::attend_tile;
#endif
  return narrow::attend_tile;
}

class Kernel {
 public:
  Kernel(const Table* table, const Info* info) : functions_(table), attend_(choose_attend()) {
    check(functions_.float_attribute(info, "scale", &scale_));
    prefix_tokens_ = integer(info, "prefix_tokens");
    hot_ = integer(info, "hot", 0);
    query_ = {integer(info, "query_heads_last", 0) != 0};
    out_ = {integer(info, "out_heads_last", 0) != 0};
  }

  void compute(Context* context) const {
    std::size_t given = 0;
    check(functions_.input_count(context, &given));
    const Tensor query = input(context, QUERY, 4), key = input(context, KEY, 4);
    const Tensor queries = input(context, TILE_QUERIES, 2), keys = input(context, TILE_KEYS, 2), places = input(context, PLACES, 1);
    FocalInputs inputs{};
    inputs.query = static_cast<const float*>(query.data);
    inputs.key = static_cast<const float*>(key.data);
    inputs.value = static_cast<const float*>(like(context, VALUE, key).data);
    inputs.tile_queries = static_cast<const std::int32_t*>(queries.data);
    inputs.tile_keys = static_cast<const std::int32_t*>(keys.data);
    inputs.tile_bias = static_cast<const float*>(like(context, TILE_BIAS, keys).data);
    inputs.places = static_cast<const std::int32_t*>(places.data);

    FocalSizes sizes{};
    sizes.batch = static_cast<std::int32_t>(query.sizes[0]);
    sizes.heads = static_cast<std::int32_t>(query.sizes[query_.heads_last ? 2 : 1]);
    sizes.tokens = static_cast<std::int32_t>(query.sizes[query_.heads_last ? 1 : 2]);
    sizes.head_size = static_cast<std::int32_t>(query.sizes[3]);
    sizes.tiles = static_cast<std::int32_t>(queries.sizes[0]);
    sizes.tile_queries = static_cast<std::int32_t>(queries.sizes[1]);
    sizes.tile_keys = static_cast<std::int32_t>(keys.sizes[1]);
    sizes.prefix_tokens = static_cast<std::int32_t>(prefix_tokens_);
    sizes.hot = static_cast<std::int32_t>(hot_);
    const std::int64_t heads_first[4] = {sizes.batch, sizes.heads, sizes.tokens, sizes.head_size};
    const std::int64_t heads_last[4] = {sizes.batch, sizes.tokens, sizes.heads, sizes.head_size};
    if (std::memcmp(key.sizes, heads_first, sizeof heads_first) != 0) throw std::invalid_argument("key has another shape than query");
    if (keys.sizes[0] != queries.sizes[0]) throw std::invalid_argument("tile_keys and tile_queries have other numbers of tiles");
    if (places.sizes[0] != sizes.tokens - sizes.prefix_tokens) throw std::invalid_argument("places must name each patch");
    if (given > KEY_MASK && present(context, KEY_MASK)) {
      const Tensor mask = input(context, KEY_MASK, 2);
      if (mask.sizes[1] != sizes.tokens || (mask.sizes[0] != 1 && mask.sizes[0] != sizes.batch)) {
        throw std::invalid_argument("key_mask must have a row, or one for each image, of all tokens");
      }
      inputs.key_mask = static_cast<const std::int32_t*>(mask.data);
      inputs.mask_rows = static_cast<std::int32_t>(mask.sizes[0]);
    }

    FocalCall call(sizes, inputs, scale_, query_, out_, attend_);
    if (call.wrong() != nullptr) throw std::invalid_argument(call.wrong());
    Value* value = nullptr;
    check(functions_.output(context, 0, out_.heads_last ? heads_last : heads_first, 4, &value));
    void* out = nullptr;
    check(functions_.data(value, &out));
    each(context, call.choosing_steps(), [&call](std::size_t step) { call.choose(step); });
    each(context, call.steps(), [&call, out](std::size_t step) { call.run(step, static_cast<float*>(out)); });
  }

  const Functions& functions() const { return functions_; }

 private:
  struct Tensor {
    const void* data;
    std::int64_t sizes[4];
  };

  std::int64_t integer(const Info* info, const char* name, std::int64_t otherwise) const {
    std::int64_t value = otherwise;
    if (Status* status = functions_.int_attribute(info, name, &value)) {
      functions_.release_status(status);
      return otherwise;
    }
    return value;
  }

  std::int64_t integer(const Info* info, const char* name) const {
    std::int64_t value = 0;
    check(functions_.int_attribute(info, name, &value));
    return value;
  }

  bool present(const Context* context, std::size_t index) const {
    const Value* value = nullptr;
    check(functions_.input(context, index, &value));
    return value != nullptr;
  }

  Tensor input(const Context* context, std::size_t index, std::size_t dimensions) const {
    const Value* value = nullptr;
    check(functions_.input(context, index, &value));
    Shape* shape = nullptr;
    check(functions_.shape(value, &shape));
    Tensor tensor{};
    std::size_t count = 0;
    Status* status = functions_.dimensions(shape, &count);
    if (status == nullptr && count == dimensions) status = functions_.sizes(shape, tensor.sizes, count);
    functions_.release_shape(shape);
    check(status);
    if (count != dimensions) {
      throw std::invalid_argument(
          "input " + std::to_string(index) + " has " + std::to_string(count) + " dimensions instead of " + std::to_string(dimensions));
    }
    void* data = nullptr;
    check(functions_.data(const_cast<Value*>(value), &data));
    tensor.data = data;
    return tensor;
  }

  Tensor like(const Context* context, std::size_t index, const Tensor& other) const {
    std::size_t dimensions = index == TILE_BIAS ? 2 : 4;
    const Tensor tensor = input(context, index, dimensions);
    if (std::memcmp(tensor.sizes, other.sizes, dimensions * sizeof(std::int64_t)) != 0) {
      throw std::invalid_argument("input " + std::to_string(index) + " has another shape than it must");
    }
    return tensor;
  }

  // Runs steps on the session's threads; the first error of any is thrown here.
  template <typename Step>
  void each(const Context* context, std::size_t steps, const Step& step) const {
    if (steps == 0) return;
    struct Work {
      const Step& step;
      std::atomic<bool> failed;
    } work{step, {false}};
    check(functions_.parallel_for(
        context,
        [](void* data, std::size_t index) {
          auto* work = static_cast<Work*>(data);
          try {
            work->step(index);
          } catch (...) {
            work->failed = true;
          }
        },
        steps, steps, &work));
    if (work.failed) throw std::bad_alloc();
  }

  Functions functions_;
  AttendTile attend_;
  float scale_ = 1.0f;
  std::int64_t prefix_tokens_ = 0, hot_ = 0;
  Layout query_{}, out_{};
};

template <typename Work>
Status* with_status(const Functions& functions, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return functions.make_status(INVALID_ARGUMENT, (std::string("FocalAttention: ") + error.what()).c_str());
  }
}

Operator focal_operator() {
  Operator record{};
  record.name = [](const Operator*) { return "FocalAttention"; };
  record.provider = [](const Operator*) { return static_cast<const char*>(nullptr); };
  record.inputs = [](const Operator*) { return static_cast<std::size_t>(INPUTS); };
  record.input_type = [](const Operator*, std::size_t index) {
    return index <= VALUE || index == TILE_BIAS ? FLOAT : INT32;
  };
  record.outputs = [](const Operator*) { return std::size_t{1}; };
  record.output_type = [](const Operator*, std::size_t) { return FLOAT; };
  record.input_kind = [](const Operator*, std::size_t index) { return index == KEY_MASK ? OPTIONAL : REQUIRED; };
  record.output_kind = [](const Operator*, std::size_t) { return REQUIRED; };
  record.input_memory = [](const Operator*, std::size_t) { return 0; };
  record.create = [](const Operator*, const Table* table, const Info* info, void** kernel) {
    return with_status(Functions(table), [&] { *kernel = new Kernel(table, info); });
  };
  record.compute = [](void* kernel, Context* context) {
    const auto* own = static_cast<Kernel*>(kernel);
    return with_status(own->functions(), [&] { own->compute(context); });
  };
  record.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return record;
}

}  // namespace
}  // namespace fna

// What onnxruntime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) fna::onnxruntime::Status* RegisterCustomOps(
    fna::onnxruntime::Options* options, const fna::onnxruntime::Base* base) {
  using namespace fna::onnxruntime;
  const Table* table = base->table(INTERFACE_VERSION);
  if (table == nullptr) return nullptr;  // older than 1.17: the session then says that it does not know the operator
  const Functions functions(table);
  static const Operator focal = fna::focal_operator();  // sessions keep pointers to both
  static Domain* domain = nullptr;
  if (domain == nullptr) {
    if (Status* status = functions.make_domain("fna.processor", &domain)) return status;
    if (Status* status = functions.add_operator(domain, &focal)) return status;
  }
  return functions.add_domain(options, domain);
}
