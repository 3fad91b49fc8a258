// conv_act for sm_80 and every newer chip: an implicit GEMM on mma.sync with cp.async, CUTLASS's own convolution, with
// bias, residual and activation in the epilogue. Blocks of one tile each, several to a multiprocessor.
//
// It stops being good where y has fewer tiles than the GPU has room for blocks: the depth is not split.
#pragma once

#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/conv/device/implicit_gemm_convolution.h>
#include <cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>
#include <cutlass/numeric_conversion.h>

#include "cuda/conv_epilogue.cuh"

namespace fastres {

// y = act(sums + bias [+ residual]) of kVector neighboring channels, in fp32, rounded once. CUTLASS's name for y is Z;
// T is a second output, which there is none of.
template <class Memory, int kVector>
struct ConvEpilogue {
  using ElementOutput = Memory;
  using ElementC = Memory;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementVector = Memory;
  using ElementZ = Memory;
  using ElementT = Memory;
  using FragmentAccumulator = cutlass::Array<float, kVector>;
  using FragmentCompute = cutlass::Array<float, kVector>;
  using FragmentC = cutlass::Array<Memory, kVector>;
  using FragmentOutput = cutlass::Array<Memory, kVector>;
  static constexpr int kElementsPerAccess = kVector;
  static constexpr int kCount = kVector;
  static constexpr bool kIsSingleSource = true;
  static constexpr bool kIsHeavy = false;
  static constexpr bool kStoreZ = true;
  static constexpr bool kStoreT = false;

  struct Params {
    Bounds bounds;
    bool residual = false;
  };
  Params params;

  CUTLASS_HOST_DEVICE explicit ConvEpilogue(const Params& given) : params(given) {}
  CUTLASS_HOST_DEVICE bool is_source_needed() const { return params.residual; }
  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}

  CUTLASS_HOST_DEVICE void operator()(FragmentOutput& y, FragmentOutput&, const FragmentAccumulator& sums,
                                      const FragmentC& residual, const FragmentCompute& bias) const {
    const FragmentCompute wide = cutlass::NumericArrayConverter<float, Memory, kVector>()(residual);
    FragmentCompute z;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) z[i] = sums[i] + bias[i] + wide[i];
    store(y, z);
  }
  CUTLASS_HOST_DEVICE void operator()(FragmentOutput& y, FragmentOutput&, const FragmentAccumulator& sums,
                                      const FragmentCompute& bias) const {
    FragmentCompute z;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) z[i] = sums[i] + bias[i];
    store(y, z);
  }

 private:
  CUTLASS_HOST_DEVICE void store(FragmentOutput& y, const FragmentCompute& z) const {
    y = cutlass::NumericArrayConverter<Memory, float, kVector>()(Bounded<FragmentCompute>()(z, params.bounds));
  }
};

// A tile is kRows pixels by kColumns channels, a warp's part kWarpRows by kWarpColumns; kBytes of depth a step.
template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kBytes, int kStages>
struct Sm80 {
  using Memory = typename ConvElement<T>::Memory;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kDepth = kBytes / static_cast<int>(sizeof(T));
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;
  using Layout = cutlass::layout::TensorNHWC;
  using Kernel = typename cutlass::conv::kernel::DefaultConv2dFpropWithBroadcast<
      Memory, Layout, Memory, Layout, Memory, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      cutlass::gemm::GemmShape<kRows, kColumns, kDepth>, cutlass::gemm::GemmShape<kWarpRows, kWarpColumns, kDepth>,
      cutlass::gemm::GemmShape<16, 8, std::is_same_v<T, float> ? 8 : 16>, ConvEpilogue<Memory, kVector>, Swizzle,
      kStages, cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized,
      cutlass::conv::StrideSupport::kStrided>::Kernel;
  using Checks = cutlass::conv::device::ImplicitGemmConvolution<Kernel>;
  static constexpr Dynamic kBlocks{Kernel::kThreadCount, sizeof(typename Kernel::SharedStorage), 1};

  static typename Kernel::Arguments arguments(const ConvShape& shape, const ConvTensors& t) {
    const auto narrow = [](int64_t v) { return static_cast<int>(v); };
    const cutlass::conv::Conv2dProblemSize problem(
        {narrow(shape.n), narrow(shape.h), narrow(shape.w), narrow(shape.c)},
        {narrow(shape.k), narrow(shape.r), narrow(shape.s), narrow(shape.c)},
        {narrow(shape.padding[0]), narrow(shape.padding[0]), narrow(shape.padding[1]), narrow(shape.padding[1])},
        {narrow(shape.stride[0]), narrow(shape.stride[1])}, {narrow(shape.dilation[0]), narrow(shape.dilation[1])},
        {narrow(shape.n), narrow(shape.p), narrow(shape.q), narrow(shape.k)},
        cutlass::conv::Mode::kCrossCorrelation, 1);
    const auto reference = [](const void* p, int64_t h, int64_t w, int64_t c) {
      const cutlass::Tensor4DCoord extent(1, static_cast<int>(h), static_cast<int>(w), static_cast<int>(c));
      return cutlass::TensorRef<Memory, Layout>(static_cast<Memory*>(const_cast<void*>(p)), Layout::packed(extent));
    };
    const auto output = [&](const void* p) { return reference(p, shape.p, shape.q, shape.k); };
    return typename Kernel::Arguments(problem, reference(t.x, shape.h, shape.w, shape.c),
                                      reference(t.weight, shape.r, shape.s, shape.c), output(t.residual), output(t.y),
                                      {{t.lower, t.upper}, t.residual != nullptr},
                                      cutlass::conv::SplitKMode::kSerial, const_cast<void*>(t.bias));
  }

  static std::string refusal(const ConvShape& given) {
    std::string reason = conv_refusal(given, sizeof(T));
    if (!reason.empty()) return reason;
    const ConvShape shape = given.as_line();
    const int64_t most = std::max({shape.n * shape.h * shape.w * shape.c, shape.k * shape.r * shape.s * shape.c,
                                   shape.pixels() * shape.k});
    if (most * static_cast<int64_t>(sizeof(T)) >= int64_t{1} << 31) {
      return "a tensor of " + std::to_string(most * sizeof(T)) + " bytes: must be smaller than 2 GiB";
    }
    if (shape.r > 32 || shape.s > 32) return "a kernel of more than 32 taps along an axis";
    const bool can = Checks::can_implement(arguments(shape, {})) == cutlass::Status::kSuccess;
    return can ? "" : "CUTLASS's can_implement refuses";
  }

  static int64_t workspace(const ConvShape&, int) { return 0; }

  static void run(const ConvShape& shape, const ConvTensors& tensors, void*, const Stream& on);
};

template <class Tile>
__global__ void __launch_bounds__(Tile::Kernel::kThreadCount)
    conv_sm80_kernel(const __grid_constant__ typename Tile::Kernel::Params params) {
  extern __shared__ char shared[];
  typename Tile::Kernel()(params, *reinterpret_cast<typename Tile::Kernel::SharedStorage*>(shared));
}

template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kBytes, int kStages>
void Sm80<T, kRows, kColumns, kWarpRows, kWarpColumns, kBytes, kStages>::run(const ConvShape& shape,
                                                                            const ConvTensors& tensors, void*,
                                                                            const Stream& on) {
  const typename Kernel::Params params(arguments(shape.as_line(), tensors));
  allow_dynamic("conv_act", on, kBlocks, conv_sm80_kernel<Sm80>);
  const dim3 grid = Swizzle::get_grid_shape(params.grid_tiled_shape);
  launch_dynamic("conv_act", on, kBlocks, grid, conv_sm80_kernel<Sm80>, params);
}

template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kBytes, int kStages>
void list_conv_sm80(std::vector<ConvTile>& tiles) {
  using Tile = Sm80<T, kRows, kColumns, kWarpRows, kWarpColumns, kBytes, kStages>;
  tiles.push_back({"sm80_" + std::to_string(kRows) + "x" + std::to_string(kColumns), type_constant<T>(), 80, kRows,
                   kColumns, Tile::kDepth, 1, false, Tile::kBlocks.threads, Tile::kBlocks.shared_bytes,
                   reinterpret_cast<const void*>(&conv_sm80_kernel<Tile>), &Tile::refusal, &Tile::workspace,
                   &Tile::run});
}

template <int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kBytes, int kStages, class... T>
void list_each_sm80(std::vector<ConvTile>& tiles) {
  (list_conv_sm80<T, kRows, kColumns, kWarpRows, kWarpColumns, kBytes, kStages>(tiles), ...);
}

}  // namespace fastres

// The kernels of a file, which is called by them: the template's sizes, element types.
#define FASTRES_LIST_SM80(NAME, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, BYTES, STAGES, ...)                 \
  void fastres::list_conv_sm80_##NAME(std::vector<ConvTile>& tiles) {                                       \
    list_each_sm80<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, BYTES, STAGES, __VA_ARGS__>(tiles);              \
  }
