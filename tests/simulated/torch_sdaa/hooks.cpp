// The simulated device: tensors of torch's PrivateUse1 whose memory is the host's, and every operator run by the CPU's kernel.
// A device tensor owns a storage of its own; while an operator runs, CPU tensors look at the same memory. Views, in-place
// and out= operators, autograd and autocast are torch's own.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
constexpr auto SDAA = c10::DeviceType::PrivateUse1;
constexpr int MOST = 64;

int count() {  // of SDAA_VISIBLE_DEVICES; without it, the four of one card
  static const int found = [] {
    const char* visible = std::getenv("SDAA_VISIBLE_DEVICES");
    if (!visible) return 4;
    std::string names(visible);
    if (names.empty() || names[0] == '-') return 0;
    return std::min<int>(MOST, 1 + std::count(names.begin(), names.end(), ','));
  }();
  return found;
}

thread_local DeviceIndex current = 0;

void select(DeviceIndex index) {
  TORCH_CHECK(0 <= index && index < count(), "sdaa: invalid device ordinal ", int(index), " of ", count());
  current = index;
}

// ---- memory: each block keeps the host's memory alive, and is counted

std::atomic<int64_t> live[MOST], peak[MOST];

struct Block {
  c10::Storage host;
  int64_t size;
  DeviceIndex index;
};

void release(void* block) {
  auto* of = static_cast<Block*>(block);
  live[of->index] -= of->size;
  delete of;
}

c10::DataPtr block(c10::Storage host, DeviceIndex index) {
  int64_t size = host.nbytes(), now = live[index] += size, before = peak[index];
  while (before < now && !peak[index].compare_exchange_weak(before, now)) {}
  void* data = host.mutable_data();
  return {data, new Block{std::move(host), size, index}, release, Device(SDAA, index)};
}

c10::Storage on_host(size_t bytes) {
  return {c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), true};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return block(on_host(bytes), current); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return SDAA; }
  Device exchangeDevice(Device to) const override {
    Device before(SDAA, current);
    setDevice(to);
    return before;
  }
  Device getDevice() const override { return {SDAA, current}; }
  void setDevice(Device to) const override { select(to.has_index() ? to.index() : current); }
  void uncheckedSetDevice(Device to) const noexcept override { current = to.has_index() ? to.index() : current; }
  c10::Stream getStream(Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream getDefaultStream(Device of) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return count(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

at::Generator& generator() {
  static at::Generator one = at::detail::createCPUGenerator();
  return one;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count(); }
  void setCurrentDevice(DeviceIndex index) const override { select(index); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return Guard().exchangeDevice({SDAA, index}).index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return {SDAA, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::Storage host = on_host(bytes);
    std::memcpy(host.mutable_data(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(::block(std::move(host), storage.device().index()));
    storage.set_nbytes(bytes);
  }
};

// ---- device tensors, and CPU tensors with the same memory

Tensor tensor_of(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

bool is_sdaa(const Tensor& x) { return x.defined() && x.device().type() == SDAA; }

// Torch's GradScaler inverts its scale in float64: a single number may be that.
void check_dtype(at::ScalarType dtype, int64_t elements, const std::string& where) {
  TORCH_CHECK(
      elements <= 1 || (dtype != at::kDouble && dtype != at::kComplexDouble), "sdaa (simulated): ", where,
      " would make a float64 tensor");
}

std::mutex writing;
std::set<std::string> ran;

// One operator's run: which CPU storage stands for which device storage, so that what overlaps still does.
struct Run {
  std::string name;
  int index = -1;
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts;
  std::unordered_map<c10::StorageImpl*, c10::Storage> devices;

  explicit Run(std::string operator_name) : name(std::move(operator_name)) {
    std::lock_guard<std::mutex> lock(writing);
    ran.insert(name);
  }

  void check(const Tensor& x) {
    if (!x.defined() || (x.dim() == 0 && !is_sdaa(x))) return;
    TORCH_CHECK(
        is_sdaa(x), "Expected all tensors to be on the same device, but ", name, " was given one of shape ", x.sizes(),
        " on ", x.device(), " together with sdaa's");
    TORCH_CHECK(
        index < 0 || index == x.device().index(), "Expected all tensors to be on the same device, but ", name,
        " was given some on sdaa:", index, " and on ", x.device());
    index = x.device().index();
  }

  Tensor host(const Tensor& x) {
    if (!is_sdaa(x)) return x;
    const c10::Storage& storage = x.storage();
    auto found = hosts.find(storage.unsafeGetStorageImpl());
    if (found == hosts.end()) {
      auto* keep = new c10::Storage(storage);
      c10::DataPtr data(
          const_cast<void*>(storage.data()), keep, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, at::kCPU);
      c10::Storage made(
          c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      devices.emplace(made.unsafeGetStorageImpl(), storage);
      found = hosts.emplace(storage.unsafeGetStorageImpl(), std::move(made)).first;
    }
    return tensor_of(found->second, c10::DispatchKey::CPU, x);
  }

  Tensor device(const Tensor& x) {
    if (!x.defined() || is_sdaa(x)) return x;
    check_dtype(x.scalar_type(), x.numel(), name);
    auto found = devices.find(x.storage().unsafeGetStorageImpl());
    if (found != devices.end()) return tensor_of(found->second, c10::DispatchKey::PrivateUse1, x);
    c10::Storage storage(
        c10::Storage::use_byte_size_t(), x.storage().nbytes(), block(x.storage(), index < 0 ? current : index),
        &allocator, true);
    return tensor_of(std::move(storage), c10::DispatchKey::PrivateUse1, x);
  }

  // What resized its output on the CPU has moved it, or changed its shape.
  void follow(const Tensor& x, const Tensor& on_cpu) {
    bool moved = !devices.count(on_cpu.storage().unsafeGetStorageImpl()) ||
        on_cpu.storage().data() != x.storage().data();
    if (!moved && x.sizes() == on_cpu.sizes() && x.strides() == on_cpu.strides()) return;
    auto* impl = x.unsafeGetTensorImpl();
    if (moved) {
      devices.erase(on_cpu.storage().unsafeGetStorageImpl());
      impl->set_storage_keep_dtype(device(on_cpu).storage());
    }
    impl->set_storage_offset(on_cpu.storage_offset());
    impl->set_sizes_and_strides(on_cpu.sizes(), on_cpu.strides());
  }
};

template <class F>
c10::IValue each(const c10::IValue& value, F f) {  // a value with f of every tensor in it
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& x : value.toTensorVector()) made.push_back(f(x));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (std::optional<Tensor> x : value.toOptionalTensorList()) {
      made.push_back(x ? std::optional<Tensor>(f(*x)) : std::nullopt);
    }
    return made;
  }
  return value;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Run run(toString(op.operator_name()));
  const auto takes = schema.arguments().size();
  std::vector<c10::IValue> given(stack->end() - takes, stack->end());
  torch::jit::drop(*stack, takes);
  for (const auto& value : given) {
    each(value, [&](const Tensor& x) { return run.check(x), x; });
  }
  std::vector<std::pair<Tensor, Tensor>> written;
  for (size_t i = 0; i < takes; ++i) {
    const auto& argument = schema.arguments()[i];
    const bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    c10::IValue value = each(given[i], [&](const Tensor& x) {
      Tensor cpu = run.host(x);
      if (writes && is_sdaa(x)) written.emplace_back(x, cpu);
      return cpu;
    });
    if (value.isDevice()) value = c10::Device(at::kCPU);
    if (value.isNone() && argument.name() == "generator") value = generator();
    stack->push_back(value);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [x, cpu] : written) run.follow(x, cpu);

  const auto returns = schema.returns().size();
  std::vector<c10::IValue> found(stack->end() - returns, stack->end());
  torch::jit::drop(*stack, returns);
  for (size_t i = 0; i < returns; ++i) {
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {  // what was written in place comes back as itself
      for (size_t j = 0; j < takes; ++j) {
        const auto* of = schema.arguments()[j].alias_info();
        if (of && *of == *alias) found[i] = given[j];
      }
      stack->push_back(found[i]);
    } else {
      stack->push_back(each(found[i], [&](const Tensor& x) { return run.device(x); }));
    }
  }
}

// ---- what torch has no kernel for on a device of others

Device chosen(std::optional<Device> device) {
  return {SDAA, device && device->has_index() ? device->index() : current};
}

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<c10::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(chosen(device));
  check_dtype(c10::dtype_or_default(dtype), c10::multiply_integers(size), "a factory");
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(chosen(device));
  check_dtype(c10::dtype_or_default(dtype), c10::multiply_integers(size), "a factory");
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  Run run("aten::_copy_from");
  run.host(to).copy_(run.host(self));
  return to;
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  Run run("aten::resize_");
  run.index = self.device().index();
  Tensor cpu = run.host(self);
  cpu.resize_(size, format);
  run.follow(self, cpu);
  return self;
}

Tensor& set_storage(
    Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups) {
  Run run("aten::convolution");
  for (const Tensor& x : {input, weight, bias.value_or(Tensor())}) run.check(x);
  return run.device(at::convolution(
      run.host(input), run.host(weight), bias ? std::optional<Tensor>(run.host(*bias)) : std::nullopt, stride, padding,
      dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  Run run("aten::convolution_backward");
  for (const Tensor& x : {grad, input, weight}) run.check(x);
  std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [a, b, c] = at::convolution_backward(
      run.host(grad), run.host(input), run.host(weight), bias, stride, padding, dilation, transposed, output_padding,
      groups, mask);
  return {run.device(a), run.device(b), run.device(c)};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("_copy_from", copy_from);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  for (const char* name : {"native_layer_norm", "native_group_norm"}) {  // torch would compose them of others
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  }
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// ---- autocast: torch's own lists

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_DTYPE)
  AT_FORALL_PROMOTE(WIDEST)
}

// ---- what the Python side asks for

TORCH_LIBRARY(simulated_sdaa, m) {
  m.def("host(Tensor x) -> Tensor", [](const Tensor& x) { return Run("host").host(x); });  // the same memory
  m.def("seed(int seed) -> ()", [](int64_t seed) { generator().set_current_seed(seed); });
  m.def("rng_state() -> Tensor", [] { return generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { generator().set_state(state); });
  m.def("count() -> int", [] { return int64_t(count()); });
  m.def("current() -> int", [] { return int64_t(current); });
  m.def("select(int index) -> ()", [](int64_t index) { select(index); });
  m.def("allocated(int index) -> int", [](int64_t index) { return int64_t(live[index]); });
  m.def("most_allocated(int index) -> int", [](int64_t index) { return int64_t(peak[index]); });
  m.def("forget_most(int index) -> ()", [](int64_t index) { peak[index] = int64_t(live[index]); });
  m.def("operators() -> str[]", [] {
    std::lock_guard<std::mutex> lock(writing);
    return std::vector<std::string>(ran.begin(), ran.end());
  });
}

static const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(SDAA, &allocator);
  return true;
}();
