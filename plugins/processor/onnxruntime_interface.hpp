// The part of onnxruntime's C interface that an operator of one's own needs, since its packages for Python carry no headers.
//
// onnxruntime keeps the order of its functions: new ones come at the end. The numbers are places in its table of functions, as
// counted with offsetof in onnxruntime_c_api.h of 1.21.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fna::onnxruntime {

struct Table;    // OrtApi
struct Status;   // OrtStatus; a null one is success
struct Options;  // OrtSessionOptions
struct Domain;   // OrtCustomOpDomain
struct Info;     // OrtKernelInfo
struct Context;  // OrtKernelContext
struct Value;    // OrtValue
struct Shape;    // OrtTensorTypeAndShapeInfo

constexpr std::uint32_t INTERFACE_VERSION = 17;  // onnxruntime 1.17, the first with parallel_for
constexpr std::uint32_t OPERATOR_VERSION = 16;   // of the record below: the first with errors from create and compute
constexpr int INVALID_ARGUMENT = 2, FLOAT = 1, INT32 = 6, REQUIRED = 0, OPTIONAL = 1;

// OrtApiBase
struct Base {
  const Table* (*table)(std::uint32_t version);
  const char* (*version)();
};

// OrtCustomOp as far as version 16 goes; what is null has onnxruntime's default.
struct Operator {
  std::uint32_t version = OPERATOR_VERSION;
  void* create_without_status = nullptr;
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, std::size_t);
  std::size_t (*inputs)(const Operator*);
  int (*output_type)(const Operator*, std::size_t);
  std::size_t (*outputs)(const Operator*);
  void* compute_without_status = nullptr;
  void (*destroy)(void*);
  int (*input_kind)(const Operator*, std::size_t);
  int (*output_kind)(const Operator*, std::size_t);
  int (*input_memory)(const Operator*, std::size_t);
  void* variadic[4] = {};
  Status* (*create)(const Operator*, const Table*, const Info*, void**);
  Status* (*compute)(void*, Context*);
};

// One function of the table, by its place.
template <typename Function>
Function function(const Table* table, std::size_t place) {
  return reinterpret_cast<Function>(reinterpret_cast<void* const*>(table)[place]);
}

struct Functions {
  explicit Functions(const Table* table)
      : make_status(function<decltype(make_status)>(table, 0)),
        make_domain(function<decltype(make_domain)>(table, 26)),
        add_operator(function<decltype(add_operator)>(table, 27)),
        add_domain(function<decltype(add_domain)>(table, 28)),
        data(function<decltype(data)>(table, 51)),
        dimensions(function<decltype(dimensions)>(table, 61)),
        sizes(function<decltype(sizes)>(table, 62)),
        shape(function<decltype(shape)>(table, 65)),
        float_attribute(function<decltype(float_attribute)>(table, 85)),
        int_attribute(function<decltype(int_attribute)>(table, 86)),
        input_count(function<decltype(input_count)>(table, 88)),
        input(function<decltype(input)>(table, 90)),
        output(function<decltype(output)>(table, 91)),
        release_status(function<decltype(release_status)>(table, 93)),
        release_shape(function<decltype(release_shape)>(table, 99)),
        float_attributes(function<decltype(float_attributes)>(table, 162)),
        parallel_for(function<decltype(parallel_for)>(table, 274)) {}

  Status* (*make_status)(int code, const char* message);
  Status* (*make_domain)(const char* name, Domain**);
  Status* (*add_operator)(Domain*, const Operator*);
  Status* (*add_domain)(Options*, Domain*);
  Status* (*data)(Value*, void**);
  Status* (*dimensions)(const Shape*, std::size_t*);
  Status* (*sizes)(const Shape*, std::int64_t*, std::size_t count);
  Status* (*shape)(const Value*, Shape**);
  Status* (*float_attribute)(const Info*, const char* name, float*);
  Status* (*int_attribute)(const Info*, const char* name, std::int64_t*);
  Status* (*input_count)(const Context*, std::size_t*);
  Status* (*input)(const Context*, std::size_t, const Value**);
  Status* (*output)(Context*, std::size_t, const std::int64_t* sizes, std::size_t count, Value**);
  void (*release_status)(Status*);
  void (*release_shape)(Shape*);
  Status* (*float_attributes)(const Info*, const char* name, float*, std::size_t* count);
  Status* (*parallel_for)(const Context*, void (*step)(void*, std::size_t), std::size_t steps, std::size_t batches, void*);
};

}  // namespace fna::onnxruntime
