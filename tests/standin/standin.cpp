// A device that is not the CPU, for tests on machines without a card. Tensors lie in memory that this allocator hands out, autograd runs
// in a thread of the device's own, and every operator computes through its CPU kernel, so values are real. The allocator rounds as
// CUDA's does, counts, and refuses to go beyond a limit. Plain C functions at the end are what standin/__init__.py calls.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr size_t kRoundTo = 512;

std::mutex mutex;
size_t allocated = 0, peak = 0, limit = SIZE_MAX, num_refused = 0;
bool is_managed = false;  // memory that is asked for now is managed (paged): no part of what the allocator counts
std::atomic<size_t> num_synchronized{0};  // times that the host waited for the device: values read, copies to the host

struct Block {
  void* data;
  size_t size;
};

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> guard(mutex);
    allocated -= block->size;
  }
  std::free(block->data);
  delete block;
}

struct StandInAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const c10::Device device(kDevice, 0);
    if (num_bytes == 0) return {nullptr, device};
    const size_t size = (num_bytes + kRoundTo - 1) / kRoundTo * kRoundTo, counted = is_managed ? 0 : size;
    {
      std::lock_guard<std::mutex> guard(mutex);
      if (allocated + counted > limit) {
        ++num_refused;
        TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes (stand-in: ", allocated,
                         " of ", limit, " are allocated)");
      }
      allocated += counted;
      peak = std::max(peak, allocated);
    }
    void* data = std::aligned_alloc(kRoundTo, size);
    TORCH_CHECK(data != nullptr, "the host has no memory left");
    return {data, new Block{data, counted}, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

StandInAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);
C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::FakeGuardImpl<kDevice>);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Device getDeviceFromPtr(void*) const override { return at::Device(kDevice, 0); }
};
const bool is_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// The same memory as a CPU tensor.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kDevice) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::DeviceType::CPU));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  if (dst.device().type() != kDevice) ++num_synchronized;
  at::NoGradGuard no_grad;
  on_host(dst).copy_(on_host(self));
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  at::native::resize_(dst, self.sizes());
  return copy_from(self, dst, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++num_synchronized;
  return on_host(self).item();
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset.has_value()) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("resize_", resize);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

void by_way_of_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t before = num_synchronized;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  num_synchronized = before;  // a card would have computed this without waiting
}

// One kernel on a card, where torch takes it apart for devices that it does not know.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&by_way_of_the_cpu>()); }

// bitsandbytes has plain PyTorch kernels for devices that it does not know; its CPU kernels are the ones that our CPU results come from.
TORCH_LIBRARY_IMPL(bitsandbytes, PrivateUse1, m) {
  for (const char* name : {"int8_vectorwise_quant", "int8_linear_matmul", "int8_mm_dequant", "int8_scaled_mm", "quantize_blockwise",
                           "dequantize_blockwise", "quantize_4bit", "dequantize_4bit", "gemv_4bit", "gemm_4bit",
                           "optimizer_update_32bit", "optimizer_update_8bit_blockwise"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_way_of_the_cpu>());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_way_of_the_cpu>()); }

}  // namespace

extern "C" {
size_t standin_allocated() { return allocated; }
size_t standin_peak() { return peak; }
void standin_reset_peak() {
  std::lock_guard<std::mutex> guard(mutex);
  peak = allocated;
}
void standin_set_limit(size_t num_bytes) { limit = num_bytes ? num_bytes : SIZE_MAX; }
void standin_set_managed(bool value) { is_managed = value; }
size_t standin_num_refused() { return num_refused; }
size_t standin_num_synchronized() { return num_synchronized; }
void standin_set_num_synchronized(size_t value) { num_synchronized = value; }
}
