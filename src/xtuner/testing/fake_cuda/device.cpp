/* A fake CUDA device: tensors that claim to lie on the device "cuda", in the memory of the CPU.
 *
 * Registered with a torch that was built without CUDA. Every operation on such tensors is done by the
 * CPU's function on the same memory, so results are those of a CPU, while devices, what is copied
 * between them, what is waited for, and memory, are those of a program on a GPU. A tensor of the CPU
 * beside one of the GPU is refused, as CUDA does. To be loaded before torch (see fake_gpu.py).
 */

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <unordered_set>

/* Takes the place of torch's own function, which knows only what torch was built with. */
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::kCUDA; }
}

namespace at {
namespace {
using namespace c10;
const Device GPU(kCUDA, 0);
const Stream STREAM(Stream::DEFAULT, GPU);

/* One device, one stream, nothing to wait for. */
struct Guard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return STREAM; }
  Stream getDefaultStream(Device) const override { return STREAM; }
  Stream getNewStream(Device, int) const override { return STREAM; }
  Stream exchangeStream(Stream) const noexcept override { return STREAM; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

/* Bytes that tensors hold, the most they held, how many there are to hold (0: no limit), how often the
 * CPU had to wait for a result, and how often SDPA would have taken cuDNN's attention. */
std::atomic<int64_t> held{0}, most{0}, limit{0}, waits{0}, plans{0};

int64_t capability = 90; /* ten times NVIDIA's number */
constexpr int64_t AMPERE = 80;

thread_local bool unseen = false; /* what this thread waits for is not counted */

void wait(bool there_is_one) { waits += there_is_one && !unseen; }

constexpr int64_t BLOCK = 512; /* CUDA's allocator hands out multiples of it */

struct Kept {
  Tensor of;
  int64_t bytes;
};

void release(void* kept) {
  held -= static_cast<Kept*>(kept)->bytes;
  delete static_cast<Kept*>(kept);
}

/* The memory of a CPU tensor as memory of the GPU. */
DataPtr memory_of(const Tensor& x) {
  const int64_t bytes = (static_cast<int64_t>(x.storage().nbytes()) + BLOCK - 1) / BLOCK * BLOCK;
  const int64_t now = held += bytes;
  if (limit && now > limit) {
    held -= bytes;
    C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " +
                                          std::to_string(bytes >> 20) + " MiB (the fake CUDA device).");
  }
  for (int64_t before = most; now > before && !most.compare_exchange_weak(before, now);) {
  }
  return DataPtr(x.storage().mutable_data(), new Kept{x, bytes}, release, GPU);
}

Tensor with_shape_of(const Tensor& x, Storage&& storage, DispatchKey key) {
  Tensor out = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(key), x.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return out;
}

Tensor on_gpu(const Tensor& x) {
  Storage storage(Storage::use_byte_size_t{}, x.storage().nbytes(), memory_of(x), nullptr, false);
  return with_shape_of(x, std::move(storage), DispatchKey::CUDA);
}

/* A tensor of the GPU as one of the CPU in the same memory; its size may be changed. */
Tensor on_cpu(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  auto forget = [](void* kept) { delete static_cast<Tensor*>(kept); };
  DataPtr data(x.storage().mutable_data(), new Tensor(x), forget, kCPU);
  Storage storage(Storage::use_byte_size_t{}, x.storage().nbytes(), std::move(data),
                  GetCPUAllocator(), true);
  return with_shape_of(x, std::move(storage), DispatchKey::CPU);
}

/* Tensors of the GPU that an operation got, and what stood for them on the CPU. */
struct Pair {
  Tensor gpu, cpu;
};

Tensor given(const OperatorHandle& op, const Tensor& x, std::vector<Pair>& pairs) {
  if (x.defined() && x.is_cuda()) {
    pairs.push_back({x, on_cpu(x)});
    return pairs.back().cpu;
  }
  /* what an optimizer of bitsandbytes keeps may lie in memory that both see */
  const bool paged = op.operator_name().name.rfind("bitsandbytes::optimizer", 0) == 0;
  TORCH_CHECK(!x.defined() || x.dim() == 0 || paged, "Expected all tensors to be on the same ",
              "device, but ", op.operator_name(), " got one of ", x.sizes(), " on the CPU");
  return x;
}

/* Indices, which may lie on either side, come as a list of optional tensors. */
std::optional<Tensor> index_given(const OperatorHandle& op, const std::optional<Tensor>& x,
                                  std::vector<Pair>& pairs) {
  return x && x->is_cuda() ? std::optional<Tensor>(given(op, *x, pairs)) : x;
}

/* What the operation gave: one of its arguments, a part of one, or something new. */
Tensor returned(const Tensor& y, const std::vector<Pair>& pairs) {
  if (!y.defined() || !y.device().is_cpu()) return y;
  for (const auto& [gpu, cpu] : pairs) {
    if (y.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) {
      if (cpu.storage().data() != gpu.storage().data()) { /* it had to grow */
        DataPtr larger = memory_of(cpu); /* may be refused */
        gpu.storage().set_nbytes(cpu.storage().nbytes());
        gpu.storage().set_data_ptr_noswap(std::move(larger));
      }
      gpu.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(),
                                                       cpu.storage_offset());
      return gpu;
    }
    if (y.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl()) {
      Tensor part = at::detail::make_tensor<TensorImpl>(TensorImpl::VIEW, Storage(gpu.storage()),
                                                        gpu.key_set(), y.dtype());
      part.unsafeGetTensorImpl()->set_sizes_and_strides(y.sizes(), y.strides(), y.storage_offset());
      return part;
    }
  }
  return on_gpu(y);
}

/* cuBLAS has no products of bfloat16 for older cards. */
void refuse_bfloat16(const OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::unordered_set<std::string> products{"aten::mm", "aten::addmm", "aten::bmm",
                                                        "aten::baddbmm"};
  if (!products.count(op.operator_name().name)) return;
  const IValue& first = stack[stack.size() - op.schema().arguments().size()];
  TORCH_CHECK(first.toTensor().scalar_type() != kBFloat16,
              "CUBLAS_STATUS_NOT_SUPPORTED: bfloat16 needs compute capability 8.0");
}

/* Any operation for which nothing else is registered below. */
void by_the_cpu(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const FunctionSchema& schema = op.schema();
  if (capability < AMPERE) refuse_bfloat16(op, *stack);
  std::vector<Pair> pairs;
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = given(op, value.toTensor(), pairs);
    } else if (value.isTensorList()) {
      c10::List<Tensor> all;
      for (const Tensor& x : value.toTensorVector()) all.push_back(given(op, x, pairs));
      value = all;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const std::optional<Tensor>& x : value.toOptionalTensorVector())
        all.push_back(index_given(op, x, pairs));
      value = all;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = Device(kCPU);
    }
  }
  {
    c10::impl::ExcludeDispatchKeyGuard below(autograd_dispatch_keyset_with_ADInplaceOrView |
                                             autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = returned(value.toTensor(), pairs);
    } else if (value.isTensorList()) {
      c10::List<Tensor> all;
      for (const Tensor& y : value.toTensorVector()) all.push_back(returned(y, pairs));
      value = all;
    }
  }
}

/* What torch does by the kind of device, before or instead of asking for a function of it. */

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  wait(from.is_cuda() != self.is_cuda() && !non_blocking);
  on_cpu(self).copy_(on_cpu(from));
  return self;
}

Scalar number_of(const Tensor& x) {
  wait(true);
  return at::_local_scalar_dense(on_cpu(x));
}

Tensor nonzero(const Tensor& x) {
  wait(true);
  return on_gpu(at::nonzero(on_cpu(x)));
}

Tensor empty(SymIntArrayRef size, std::optional<ScalarType> type, std::optional<Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return on_gpu(at::empty(C10_AS_INTARRAYREF_SLOW(size), type, kStrided, kCPU, false, format));
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<ScalarType> type,
                     std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return on_gpu(at::empty_strided(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                  type, kStrided, kCPU, false));
}

Tensor& set_part(Tensor& self, Storage source, SymInt offset, SymIntArrayRef size,
                 SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole(Tensor& self, Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(IntArrayRef{count}, IntArrayRef{1}, 0);
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_part(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(),
                  source.sym_strides());
}

void record_stream(Tensor&, Stream) {}

/* Flash attention (fake_attention.py) where a real card takes it or cuDNN's, else the formula. */
int64_t kind_of_attention(const Tensor& query, const Tensor&, const Tensor&,
                          const std::optional<Tensor>& mask, double dropout, bool,
                          std::optional<double>, bool) {
  const bool flash = query.element_size() == 2 && !mask && dropout == 0.0 && capability >= AMPERE;
  plans += flash && capability >= 90 && globalContext().userEnabledCuDNNSDP();
  return static_cast<int64_t>(flash ? SDPBackend::flash_attention : SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, CUDA, all) {
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, own) {
  own.impl("copy_", copy_);
  own.impl("_local_scalar_dense", number_of);
  own.impl("nonzero", nonzero);
  own.impl("empty.memory_format", empty);
  own.impl("empty_strided", empty_strided);
  own.impl("set_.source_Tensor", set_tensor);
  own.impl("set_.source_Storage", set_whole);
  own.impl("set_.source_Storage_storage_offset", set_part);
  own.impl("record_stream", record_stream);
  native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&kind_of_attention);
}

/* For these it also has slow functions that suit every device. */
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, own) {
  for (const char* name : {"quantize_4bit", "dequantize_4bit", "quantize_blockwise",
                           "dequantize_blockwise", "gemv_4bit", "optimizer_update_32bit",
                           "optimizer_update_8bit_blockwise"})
    own.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}
}  // namespace

struct CUDAHooks : CUDAHooksInterface { /* torch looks for this name */
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { /* and no other numbers */
    return at::detail::getDefaultCPUGenerator();
  }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, at::Guard)
}

extern "C" {
int64_t fake_held() { return at::held; }
int64_t fake_most() { return at::most; }
int64_t fake_waits() { return at::waits; }
int64_t fake_plans() { return at::plans; }
void fake_capability(int number) { at::capability = number; }
void fake_wait() { at::wait(true); }
void fake_unseen(int on) { at::unseen = on; }
void fake_forget_most() { at::most = at::held.load(); }
void fake_limit(int64_t bytes) { at::limit = bytes; }
}
