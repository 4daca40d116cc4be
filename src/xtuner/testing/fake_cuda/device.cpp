/* A fake CUDA device: tensors that report the device "cuda" but live in CPU memory.
 *
 * Registered with a torch built without CUDA. Every operation on such tensors runs the CPU function on
 * the same memory, so results are those of a CPU, while devices, copies, synchronizations and memory are
 * those of a program on a GPU. Mixing CPU and CUDA tensors is an error, as with CUDA. Must be loaded
 * before torch (see device.py).
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

/* Overrides torch's function, which only knows the devices torch was built with. */
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::kCUDA; }
}

namespace at {
namespace {
using namespace c10;
const Device GPU(kCUDA, 0);
const Stream STREAM(Stream::DEFAULT, GPU);

/* One device and one stream that is always idle. */
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

/* Allocated bytes, their peak, the limit (0: none), the number of synchronizations, and how often SDPA
 * would have used cuDNN's attention. */
std::atomic<int64_t> allocated{0}, peak{0}, limit{0}, syncs{0}, cudnn_plans{0};

int64_t capability = 90; /* ten times NVIDIA's number */
constexpr int64_t AMPERE = 80;

thread_local bool uncounted = false; /* synchronizations of this thread are not counted */

void synchronize(bool needed) { syncs += needed && !uncounted; }

constexpr int64_t BLOCK = 512; /* granularity of CUDA's caching allocator */

struct Holder {
  Tensor of;
  int64_t bytes;
};

void release(void* kept) {
  allocated -= static_cast<Holder*>(kept)->bytes;
  delete static_cast<Holder*>(kept);
}

/* The memory of a CPU tensor as memory of the fake device. */
DataPtr memory_of(const Tensor& x) {
  const int64_t bytes = (static_cast<int64_t>(x.storage().nbytes()) + BLOCK - 1) / BLOCK * BLOCK;
  const int64_t now = allocated += bytes;
  if (limit && now > limit) {
    allocated -= bytes;
    C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " +
                                          std::to_string(bytes >> 20) + " MiB (fake CUDA device).");
  }
  for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {
  }
  return DataPtr(x.storage().mutable_data(), new Holder{x, bytes}, release, GPU);
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

/* A CUDA tensor as a resizable CPU tensor in the same memory. */
Tensor on_cpu(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  auto forget = [](void* kept) { delete static_cast<Tensor*>(kept); };
  DataPtr data(x.storage().mutable_data(), new Tensor(x), forget, kCPU);
  Storage storage(Storage::use_byte_size_t{}, x.storage().nbytes(), std::move(data),
                  GetCPUAllocator(), true);
  return with_shape_of(x, std::move(storage), DispatchKey::CPU);
}

/* The CUDA arguments of an operation and the CPU tensors that replace them. */
struct Pair {
  Tensor gpu, cpu;
};

Tensor given(const OperatorHandle& op, const Tensor& x, std::vector<Pair>& pairs) {
  if (x.defined() && x.is_cuda()) {
    pairs.push_back({x, on_cpu(x)});
    return pairs.back().cpu;
  }
  /* the state of paged bitsandbytes optimizers is in unified memory */
  const bool paged = op.operator_name().name.rfind("bitsandbytes::optimizer", 0) == 0;
  TORCH_CHECK(!x.defined() || x.dim() == 0 || paged, "Expected all tensors to be on the same ",
              "device, but ", op.operator_name(), " got one of ", x.sizes(), " on the CPU");
  return x;
}

/* Indices are lists of optional tensors, on either device. */
std::optional<Tensor> index_given(const OperatorHandle& op, const std::optional<Tensor>& x,
                                  std::vector<Pair>& pairs) {
  return x && x->is_cuda() ? std::optional<Tensor>(given(op, *x, pairs)) : x;
}

/* Convert a result of an operation: one of its arguments, a view of one, or a new tensor. */
Tensor returned(const Tensor& y, const std::vector<Pair>& pairs) {
  if (!y.defined() || !y.device().is_cpu()) return y;
  for (const auto& [gpu, cpu] : pairs) {
    if (y.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) {
      if (cpu.storage().data() != gpu.storage().data()) { /* it was resized */
        DataPtr larger = memory_of(cpu); /* may run out of memory */
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

/* cuBLAS has no bfloat16 products on older GPUs. */
void refuse_bfloat16(const OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::unordered_set<std::string> products{"aten::mm", "aten::addmm", "aten::bmm",
                                                        "aten::baddbmm"};
  if (!products.count(op.operator_name().name)) return;
  const IValue& first = stack[stack.size() - op.schema().arguments().size()];
  TORCH_CHECK(first.toTensor().scalar_type() != kBFloat16,
              "CUBLAS_STATUS_NOT_SUPPORTED: bfloat16 needs compute capability 8.0");
}

/* Every operation that has no registration of its own below. */
void cpu_fallback(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
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

/* Operations that create memory on the device or synchronize with it. */

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  synchronize(from.is_cuda() != self.is_cuda() && !non_blocking);
  on_cpu(self).copy_(on_cpu(from));
  return self;
}

Scalar number_of(const Tensor& x) {
  synchronize(true);
  return at::_local_scalar_dense(on_cpu(x));
}

Tensor nonzero(const Tensor& x) {
  synchronize(true);
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

Tensor& set_storage(Tensor& self, Storage source) {
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

/* Flash attention (attention.py) where a real GPU uses it or cuDNN's, else the math backend. */
int64_t kind_of_attention(const Tensor& query, const Tensor&, const Tensor&,
                          const std::optional<Tensor>& mask, double dropout, bool,
                          std::optional<double>, bool) {
  const bool flash = query.element_size() == 2 && !mask && dropout == 0.0 && capability >= AMPERE;
  cudnn_plans += flash && capability >= 90 && globalContext().userEnabledCuDNNSDP();
  return static_cast<int64_t>(flash ? SDPBackend::flash_attention : SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, CUDA, all) {
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&cpu_fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, own) {
  own.impl("copy_", copy_);
  own.impl("_local_scalar_dense", number_of);
  own.impl("nonzero", nonzero);
  own.impl("empty.memory_format", empty);
  own.impl("empty_strided", empty_strided);
  own.impl("set_.source_Tensor", set_tensor);
  own.impl("set_.source_Storage", set_storage);
  own.impl("set_.source_Storage_storage_offset", set_part);
  own.impl("record_stream", record_stream);
  native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&kind_of_attention);
}

/* bitsandbytes also registers slow device-independent versions of these. */
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, own) {
  for (const char* name : {"quantize_4bit", "dequantize_4bit", "quantize_blockwise",
                           "dequantize_blockwise", "gemv_4bit", "optimizer_update_32bit",
                           "optimizer_update_8bit_blockwise"})
    own.impl(name, torch::CppFunction::makeFromBoxedFunction<&cpu_fallback>());
}
}  // namespace

struct CUDAHooks : CUDAHooksInterface { /* torch looks for this name */
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { /* shared with the CPU */
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
int64_t fake_allocated() { return at::allocated; }
int64_t fake_peak() { return at::peak; }
int64_t fake_syncs() { return at::syncs; }
int64_t fake_cudnn_plans() { return at::cudnn_plans; }
void fake_capability(int number) { at::capability = number; }
void fake_synchronize() { at::synchronize(true); }
void fake_uncounted(int on) { at::uncounted = on; }
void fake_reset_peak() { at::peak = at::allocated.load(); }
void fake_limit(int64_t bytes) { at::limit = bytes; }
}
