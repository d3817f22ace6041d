// FocalAttention and FastNystromAttention as operators of onnxruntime's processor: what RegisterCustomOps adds to a session.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "focal_attention.hpp"
#include "nystrom_attention.hpp"
#include "onnxruntime_interface.hpp"

namespace fna {
namespace {

using namespace onnxruntime;

// An error of onnxruntime's own, passed on as it is.
struct Failed {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failed{status};
}

// The fastest kind of instructions that this processor has, or FNA_INSTRUCTIONS=narrow, middle, for tests.
const Instructions& choose_instructions() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("FNA_INSTRUCTIONS");
  const std::string most = wanted == nullptr ? "wide" : wanted;
  __builtin_cpu_init();
  if (most == "wide" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return wide::instructions;
  if (most != "narrow" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return middle::instructions;
#endif
  return narrow::instructions;
}

// What the kernels of all operators need: inputs, attributes, results, the session's threads.
class Kernel {
 public:
  explicit Kernel(const Table* table) : functions_(table), instructions_(choose_instructions()) {}
  virtual ~Kernel() = default;
  virtual void compute(Context* context) const = 0;

  const Functions& functions() const { return functions_; }

 protected:
  struct Tensor {
    const void* data;
    std::int64_t sizes[4];

    template <typename Number>
    const Number* numbers() const {
      return static_cast<const Number*>(data);
    }
  };

  const Instructions& instructions() const { return instructions_; }

  float number(const Info* info, const char* name) const {
    float value = 0.0f;
    check(functions_.float_attribute(info, name, &value));
    return value;
  }

  std::int32_t integer(const Info* info, const char* name, std::int64_t otherwise) const {
    std::int64_t value = otherwise;
    if (Status* status = functions_.int_attribute(info, name, &value)) {
      functions_.release_status(status);
      return static_cast<std::int32_t>(otherwise);
    }
    return static_cast<std::int32_t>(value);
  }

  template <typename Settings>
  void read_layouts(const Info* info, Settings& settings) const {
    settings.query_layout = {integer(info, "query_heads_last", 0) != 0};
    settings.out_layout = {integer(info, "out_heads_last", 0) != 0};
  }

  // Empty where the attribute is absent.
  std::vector<float> list(const Info* info, const char* name) const {
    std::size_t count = 0;
    if (Status* status = functions_.float_attributes(info, name, nullptr, &count)) {
      functions_.release_status(status);
      return {};
    }
    std::vector<float> values(count);
    check(functions_.float_attributes(info, name, values.data(), &count));
    return values;
  }

  bool has(const Context* context, std::size_t index) const {
    std::size_t given = 0;
    check(functions_.input_count(context, &given));
    if (index >= given) return false;
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

  // A key or a value, of the queries' sizes with heads first.
  const float* heads_first(const Context* context, std::size_t index, const Sizes& sizes) const {
    const Tensor tensor = input(context, index, 4);
    const std::int64_t wanted[4] = {sizes.batch, sizes.heads, sizes.tokens, sizes.head_size};
    if (std::memcmp(tensor.sizes, wanted, sizeof wanted) != 0) throw std::invalid_argument("key and value must have query's shape");
    return tensor.numbers<float>();
  }

  // A row for all images or one for each, of so many numbers; returns how many rows.
  std::int32_t rows(const Tensor& tensor, const Sizes& sizes, std::int32_t columns, const char* otherwise) const {
    if (tensor.sizes[1] != columns || (tensor.sizes[0] != 1 && tensor.sizes[0] != sizes.batch)) throw std::invalid_argument(otherwise);
    return static_cast<std::int32_t>(tensor.sizes[0]);
  }

  static Sizes sizes_of(const Tensor& query, Layout layout) {
    const auto side = [&query](int axis) { return static_cast<std::int32_t>(query.sizes[axis]); };
    return {side(0), side(layout.heads_last ? 2 : 1), side(layout.heads_last ? 1 : 2), side(3)};
  }

  float* output(Context* context, const Sizes& sizes, Layout layout) const {
    const std::int64_t heads_first[4] = {sizes.batch, sizes.heads, sizes.tokens, sizes.head_size};
    const std::int64_t heads_last[4] = {sizes.batch, sizes.tokens, sizes.heads, sizes.head_size};
    Value* value = nullptr;
    check(functions_.output(context, 0, layout.heads_last ? heads_last : heads_first, 4, &value));
    void* data = nullptr;
    check(functions_.data(value, &data));
    return static_cast<float*>(data);
  }

  // Runs steps on the session's threads.
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
          } catch (...) {  // steps throw for want of memory alone
            work->failed = true;
          }
        },
        steps, steps, &work));
    if (work.failed) throw std::bad_alloc();
  }

 private:
  Functions functions_;
  const Instructions& instructions_;
};

class FocalKernel : public Kernel {
 public:
  enum Input { QUERY, KEY, VALUE, TILE_QUERIES, TILE_KEYS, TILE_BIAS, PLACES, KEY_MASK, INPUTS };
  static constexpr const char* NAME = "FocalAttention";
  static int type(std::size_t index) { return index <= VALUE || index == TILE_BIAS ? FLOAT : INT32; }
  static int kind(std::size_t index) { return index == KEY_MASK ? OPTIONAL : REQUIRED; }

  FocalKernel(const Table* table, const Info* info) : Kernel(table) {
    settings_.scale = number(info, "scale");
    settings_.prefix_tokens = integer(info, "prefix_tokens", 0);
    settings_.hot = integer(info, "hot", 0);
    read_layouts(info, settings_);
  }

  void compute(Context* context) const override {
    const Tensor query = input(context, QUERY, 4), queries = input(context, TILE_QUERIES, 2), keys = input(context, TILE_KEYS, 2);
    const Tensor bias = input(context, TILE_BIAS, 2), places = input(context, PLACES, 1);
    const Sizes sizes = sizes_of(query, settings_.query_layout);
    FocalInputs inputs = settings_;
    inputs.query = query.numbers<float>();
    inputs.key = heads_first(context, KEY, sizes);
    inputs.value = heads_first(context, VALUE, sizes);
    inputs.tile_queries = queries.numbers<std::int32_t>();
    inputs.tile_keys = keys.numbers<std::int32_t>();
    inputs.tile_bias = bias.numbers<float>();
    inputs.places = places.numbers<std::int32_t>();
    inputs.tiles = static_cast<std::int32_t>(queries.sizes[0]);
    inputs.queries_each = static_cast<std::int32_t>(queries.sizes[1]);
    inputs.keys_each = static_cast<std::int32_t>(keys.sizes[1]);
    if (keys.sizes[0] != inputs.tiles) throw std::invalid_argument("tile_keys and tile_queries have other numbers of tiles");
    if (std::memcmp(keys.sizes, bias.sizes, sizeof keys.sizes) != 0) throw std::invalid_argument("tile_bias must have tile_keys' shape");
    if (places.sizes[0] != sizes.tokens - inputs.prefix_tokens) throw std::invalid_argument("places must name each patch");
    if (has(context, KEY_MASK)) {
      const Tensor mask = input(context, KEY_MASK, 2);
      inputs.mask_rows = rows(mask, sizes, sizes.tokens, "key_mask must have a row, or one for each image, of all tokens");
      inputs.key_mask = mask.numbers<std::int32_t>();
    }
    FocalCall call(sizes, inputs, instructions());
    float* out = output(context, sizes, inputs.out_layout);
    each(context, call.choosing_steps(), [&call](std::size_t step) { call.choose(step); });
    each(context, call.steps(), [&call, out](std::size_t step) { call.run(step, out); });
  }

 private:
  FocalInputs settings_{};
};

class NystromKernel : public Kernel {
 public:
  enum Input { QUERY, KEY, VALUE, LANDMARKS, LANDMARK_BIAS, INPUTS };
  static constexpr const char* NAME = "FastNystromAttention";
  static int type(std::size_t index) { return index == LANDMARKS ? INT32 : FLOAT; }
  static int kind(std::size_t) { return REQUIRED; }

  NystromKernel(const Table* table, const Info* info) : Kernel(table) {
    settings_.scale = number(info, "scale");
    settings_.iterations = integer(info, "iterations", 0);
    settings_.exact_rows = integer(info, "exact_rows", 0) != 0;
    settings_.alphas = list(info, "alphas");
    settings_.betas = list(info, "betas");
    if (settings_.alphas.size() != settings_.betas.size()) throw std::invalid_argument("alphas and betas must be as many");
    read_layouts(info, settings_);
  }

  void compute(Context* context) const override {
    const Tensor query = input(context, QUERY, 4), landmarks = input(context, LANDMARKS, 2), bias = input(context, LANDMARK_BIAS, 2);
    const Sizes sizes = sizes_of(query, settings_.query_layout);
    NystromInputs inputs = settings_;
    inputs.query = query.numbers<float>();
    inputs.key = heads_first(context, KEY, sizes);
    inputs.value = heads_first(context, VALUE, sizes);
    inputs.landmarks = landmarks.numbers<std::int32_t>();
    inputs.landmark_bias = bias.numbers<float>();
    inputs.count = static_cast<std::int32_t>(landmarks.sizes[1]);
    inputs.landmark_rows = rows(landmarks, sizes, inputs.count, "landmarks must have a row, or one for each image");
    inputs.bias_rows = rows(bias, sizes, inputs.count, "landmark_bias must have a row, or one for each image, of all landmarks");
    NystromCall call(sizes, inputs, instructions());
    float* out = output(context, sizes, inputs.out_layout);
    each(context, call.landmark_steps(), [&call](std::size_t step) { call.attend_from_landmarks(step); });
    each(context, call.core_steps(), [&call](std::size_t step) { call.project(step); });
    each(context, call.query_steps(), [&call, out](std::size_t step) { call.attend_to_landmarks(step, out); });
  }

 private:
  NystromInputs settings_{};
};

template <typename OfOperator, typename Work>
Status* with_status(const Functions& functions, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return functions.make_status(INVALID_ARGUMENT, (std::string(OfOperator::NAME) + ": " + error.what()).c_str());
  }
}

template <typename OfOperator>
Operator record_of() {
  Operator record{};
  record.name = [](const Operator*) { return OfOperator::NAME; };
  record.provider = [](const Operator*) { return static_cast<const char*>(nullptr); };
  record.inputs = [](const Operator*) { return static_cast<std::size_t>(OfOperator::INPUTS); };
  record.input_type = [](const Operator*, std::size_t index) { return OfOperator::type(index); };
  record.input_kind = [](const Operator*, std::size_t index) { return OfOperator::kind(index); };
  record.outputs = [](const Operator*) { return std::size_t{1}; };
  record.output_type = [](const Operator*, std::size_t) { return FLOAT; };
  record.output_kind = [](const Operator*, std::size_t) { return REQUIRED; };
  record.input_memory = [](const Operator*, std::size_t) { return 0; };
  record.create = [](const Operator*, const Table* table, const Info* info, void** kernel) {
    return with_status<OfOperator>(Functions(table), [&] { *kernel = static_cast<Kernel*>(new OfOperator(table, info)); });
  };
  record.compute = [](void* kernel, Context* context) {
    const auto* own = static_cast<Kernel*>(kernel);
    return with_status<OfOperator>(own->functions(), [&] { own->compute(context); });
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
  static const Operator focal = fna::record_of<fna::FocalKernel>(), nystrom = fna::record_of<fna::NystromKernel>();
  static Domain* domain = nullptr;  // sessions keep pointers to it and to the records
  if (domain == nullptr) {
    if (Status* status = functions.make_domain("fna.processor", &domain)) return status;
    if (Status* status = functions.add_operator(domain, &focal)) return status;
    if (Status* status = functions.add_operator(domain, &nystrom)) return status;
  }
  return functions.add_domain(options, domain);
}
