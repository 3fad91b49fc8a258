// conv_act for sm_90a: an implicit GEMM whose tiles of x the copy engine gathers (TMA, im2col mode), warp-specialized,
// on wgmma, with bias, residual and activation in the epilogue.
//
//     rows      N * P * Q pixels of y              a tile: 64 to 256
//     columns   K channels of y                    a tile: 64 to 256
//     depth     R * S taps times C channels of x   a step: 128 bytes of one tap's channels, the widest swizzle
//
// One warpgroup loads, two multiply: on one tile together (cooperative), or each on its own, so that the epilogue of
// one goes under the products of the other (ping-pong). Blocks are persistent: one to a multiprocessor, and with
// stream-K they share the depth of tiles that do not fill the last wave.
//
// CUTLASS 4.2 has the mainloop (the gather, wgmma) but pairs it with a kernel of one tile a block alone. The
// kernels it has for matrix products are what ConvMainloop below fits it to.
//
// It stops being good where C is far from a multiple of 128 bytes, which are multiplied in full, and where y has few
// pixels and the depth is short.
#pragma once

#include <cstddef>

#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.hpp>

#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convolution.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include "cuda/conv_epilogue.cuh"

namespace fastres {

enum class Schedule { kCooperative, kPingpong, kStreamK };

template <int kStages, class Cluster, class Kernel>
struct ConvPolicy {
  static constexpr int Stages = kStages;
  static constexpr int PipelineAsyncMmaStages = 1;
  using ClusterShape = Cluster;
  using ArchTag = cutlass::arch::Sm90;
  using Schedule = Kernel;
};

// The convolution's mainloop with the face of a matrix product's: the problem comes with the arguments, and tensors
// have a batch mode, of size 1.
template <class Conv, class Policy>
struct ConvMainloop : Conv {
  using DispatchPolicy = Policy;
  using StrideA = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideB = cute::Stride<int64_t, cute::_1, int64_t>;
  using Params = typename Conv::Params;
  static constexpr int NumProducerThreadEvents = 1;

  struct Arguments {
    typename Conv::Arguments tensors;
    typename Conv::ProblemShape problem;
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& a, void* workspace) {
    return Conv::to_underlying_arguments(a.problem, a.tensors, workspace);
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments& a) {
    return Conv::can_implement(a.problem, a.tensors);
  }

  template <class Shape>
  CUTLASS_DEVICE auto load_init(const Shape& shape, const Params& params) {
    // (rows, depth, row tiles, steps), (columns, depth, column tiles, steps)
    auto [a, b] = Conv::load_init(shape, params);
    return cute::make_tuple(with_batch(a), with_batch(b));
  }
  template <class A, class B, class Steps, class Coordinate>
  CUTLASS_DEVICE void load(const Params& params, typename Conv::MainloopPipeline pipeline,
                           typename Conv::PipelineState state, const cute::tuple<A, B>& tiles,
                           const Coordinate& coordinate, Steps step, int steps, int thread, uint32_t rank,
                           typename Conv::TensorStorage& storage) {
    using cute::_, cute::_0;
    const auto inputs = cute::make_tuple(cute::get<0>(tiles)(_, _, _, _, _0{}), cute::get<1>(tiles)(_, _, _, _, _0{}));
    // The kernel's iterator refers to a shape that is gone by now: made for depths of one mode, it is never looked at
    // there. Ours has three, and carries from one to the next by it.
    const auto shape = cute::shape<3>(cute::get<0>(inputs));
    const auto from = cute::make_coord_iterator(*step, shape);
    Conv::load(params, pipeline, state, inputs, coordinate, from, steps, thread, rank, storage);
  }

 private:
  template <class Tiles>
  CUTLASS_DEVICE static auto with_batch(const Tiles& t) {
    return cute::make_tensor(t.data(), cute::append<5>(t.layout(), cute::make_layout(cute::_1{}, cute::_0{})));
  }
};

// T: float, Half or BFloat16. A tile is kRows pixels by kColumns channels; kCluster blocks, neighbors in pixels, share
// a tile of the weights.
template <class T, int kRows, int kColumns, int kCluster, Schedule kSchedule>
struct Sm90 {
  using Memory = typename ConvElement<T>::Memory;
  using Product = typename ConvElement<T>::Product;
  using Depth = cute::Int<128 / static_cast<int>(sizeof(T))>;
  using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Shape<Depth>>;
  using Cluster = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;
  static constexpr bool kPingpong = kSchedule == Schedule::kPingpong;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));

  using Row = cutlass::layout::RowMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Memory, Row, kVector, Memory, Row, kVector,
      cute::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                          cutlass::epilogue::TmaWarpSpecializedCooperative>,
      cutlass::epilogue::fusion::LinCombPerColBiasEltAct<Bounded, Memory, float, Memory, Memory, float>>::CollectiveOp;

  using TiledMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Product, Product, float, Tile, cute::GMMA::Major::K, cute::GMMA::Major::K>(),
      cute::Layout<cute::Shape<cute::Int<kPingpong ? 1 : 2>, cute::_1, cute::_1>>{}));

  // What is left of shared memory beside the epilogue and the kernel's barriers holds steps of both operands.
  static constexpr int kStep = (kRows + kColumns) * 128;
  static constexpr int kBarriers = 1024;
  static constexpr int kStages = (cutlass::gemm::collective::detail::sm90_smem_capacity_bytes - kBarriers -
                                  static_cast<int>(sizeof(typename Epilogue::SharedStorage))) /
                                 kStep;
  template <int kLines>
  using Staged = decltype(cute::tile_to_shape(
      cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::K, Product, cute::Int<kLines>,
                                                          cute::Shape<Depth>>(),
      cute::make_shape(cute::Int<kLines>{}, cute::Shape<Depth>{}, cute::Int<kStages>{}),
      cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using CopyX = cute::SM90_TMA_LOAD_IM2COL;  // no two blocks of a cluster share pixels
  using CopyWeight = cute::conditional_t<kCluster == 1, cute::SM90_TMA_LOAD, cute::SM90_TMA_LOAD_MULTICAST>;

  using Gather = cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<cutlass::conv::Operator::kFprop, kStages,
                                                                               2, Cluster>;
  using Conv = cutlass::conv::collective::CollectiveConv<
      Gather, Tile, Memory, Memory, TiledMma,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<CopyX, Staged<kRows>>,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<CopyWeight, Staged<kColumns>>>;
  using Persistent = cute::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                         cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Mainloop = ConvMainloop<Conv, ConvPolicy<kStages, Cluster, Persistent>>;
  using Scheduler = cute::conditional_t<kSchedule == Schedule::kStreamK, cutlass::gemm::StreamKScheduler,
                                        cutlass::gemm::PersistentScheduler>;
  using Problem = cute::Shape<int, int, cute::Shape<int, int, int>, int>;  // rows, columns, (C, S, R), 1
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue, Scheduler>;

  using Storage = typename Kernel::SharedStorage;
  static_assert(sizeof(Storage) <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);
  static_assert(offsetof(Storage, tensors.mainloop.smem_A) % 1024 == 0 &&
                    offsetof(Storage, tensors.mainloop.smem_B) % 1024 == 0,
                "the swizzle repeats after 1024 bytes: wgmma and the copy engine must begin it at the same place");
  static_assert(kStages >= 3, "two steps are read while one is written");
  static constexpr Dynamic kBlocks{static_cast<int>(Kernel::MaxThreadsPerBlock), Kernel::SharedStorageSize, kCluster};

  // The largest corner and tap offset that the copy engine's im2col mode takes, in pixels.
  static constexpr int64_t kCorner = 127, kOffset = 254, kStride = 8;

  // Its stride from one image of x to the next has 40 bits; and of a smaller y 32 bits count the tiles.
  static bool too_large(int64_t pixels, int64_t channels) {
    return pixels > ((int64_t{1} << 40) - 1) / (channels * static_cast<int64_t>(sizeof(T)));
  }

  static typename Conv::ProblemShape problem(const ConvShape& shape) {
    const auto narrow = [](int64_t v) { return static_cast<int>(v); };
    const int padding[2] = {narrow(shape.padding[0]), narrow(shape.padding[1])};
    return typename Conv::ProblemShape(
        cutlass::conv::Mode::kCrossCorrelation, {narrow(shape.n), narrow(shape.h), narrow(shape.w), narrow(shape.c)},
        {narrow(shape.k), narrow(shape.r), narrow(shape.s), narrow(shape.c)}, {padding[0], padding[1]},
        {padding[0], padding[1]}, {narrow(shape.stride[0]), narrow(shape.stride[1])},
        {narrow(shape.dilation[0]), narrow(shape.dilation[1])}, 1);
  }

  static typename Kernel::Arguments arguments(const ConvShape& shape, const ConvTensors& t, int multiprocessors) {
    typename Kernel::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    a.problem_shape = {static_cast<int>(shape.pixels()), static_cast<int>(shape.k),
                       {static_cast<int>(shape.c), static_cast<int>(shape.s), static_cast<int>(shape.r)}, 1};
    a.mainloop.tensors = {static_cast<const Memory*>(t.x), static_cast<const Memory*>(t.weight)};
    a.mainloop.problem = problem(shape);
    // Without a residual y stands in its place, in a descriptor that nothing is read through.
    a.epilogue.ptr_C = static_cast<const Memory*>(t.residual != nullptr ? t.residual : t.y);
    a.epilogue.ptr_D = static_cast<Memory*>(t.y);
    a.epilogue.dC = a.epilogue.dD = {shape.k, cute::_1{}, 0};
    a.epilogue.thread.beta = t.residual != nullptr ? 1.0f : 0.0f;
    a.epilogue.thread.bias_ptr = static_cast<const Memory*>(t.bias);
    a.epilogue.thread.activation = {t.lower, t.upper};
    a.hw_info.sm_count = multiprocessors;
    if constexpr (kSchedule == Schedule::kStreamK) {
      // Blocks add up in a fixed order: by atomics, but each waits for the one before it.
      using Parameters = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams;
      a.scheduler.reduction_mode = Parameters::ReductionMode::Deterministic;
    }
    return a;
  }

  static std::string refusal(const ConvShape& given) {
    std::string reason = conv_refusal(given, sizeof(T));
    if (!reason.empty()) return reason;
    const ConvShape shape = given.as_line();
    for (int i = 0; i < 2; ++i) {
      const int64_t reach = (i == 0 ? shape.r - 1 : shape.s - 1) * shape.dilation[i];
      if (shape.stride[i] > kStride) {
        return "a stride of " + std::to_string(shape.stride[i]) + ", at most 8 can be gathered";
      }
      if (shape.padding[i] > kCorner || reach - shape.padding[i] > kCorner || reach > kOffset) {
        return "padding of " + std::to_string(shape.padding[i]) + " for a kernel that reaches over " +
               std::to_string(reach + 1) + " pixels: too far to be gathered";
      }
    }
    if (too_large(shape.h * shape.w, shape.c) || too_large(shape.pixels(), shape.k)) {
      return "a tensor of 2^40 bytes or more: y, or one image of x";
    }
    return Kernel::can_implement(arguments(shape, {}, 1)) ? "" : "CUTLASS's can_implement refuses";
  }

  static int64_t workspace(const ConvShape& shape, int multiprocessors) {
    return static_cast<int64_t>(Kernel::get_workspace_size(arguments(shape.as_line(), {}, multiprocessors)));
  }

  static void run(const ConvShape& shape, const ConvTensors& tensors, void* workspace, const Stream& on);
};

template <class Tile>
__global__ void __launch_bounds__(Tile::Kernel::MaxThreadsPerBlock, 1)
    conv_sm90_kernel(const __grid_constant__ typename Tile::Kernel::Params params) {
  extern __shared__ char shared[];
  typename Tile::Kernel()(params, shared);
}

template <class T, int kRows, int kColumns, int kCluster, Schedule kSchedule>
void Sm90<T, kRows, kColumns, kCluster, kSchedule>::run(const ConvShape& shape, const ConvTensors& tensors,
                                                        void* workspace, const Stream& on) {
  auto a = arguments(shape.as_line(), tensors, static_cast<int>(multiprocessors(on.device)));
  a.hw_info.max_active_clusters = allow_dynamic("conv_act", on, kBlocks, conv_sm90_kernel<Sm90>);
  if (Kernel::initialize_workspace(a, workspace, on.stream) != cutlass::Status::kSuccess) {
    check_cuda(cudaGetLastError(), "conv_act's workspace", on.device);
  }
  const auto params = Kernel::to_underlying_arguments(a, workspace);
  launch_dynamic("conv_act", on, kBlocks, Kernel::get_grid_shape(params), conv_sm90_kernel<Sm90>, params);
}

template <class T, int kRows, int kColumns, int kCluster, Schedule kSchedule>
void list_conv_sm90(std::vector<ConvTile>& tiles) {
  using Tile = Sm90<T, kRows, kColumns, kCluster, kSchedule>;
  std::string name = "sm90_" + std::to_string(kRows) + "x" + std::to_string(kColumns);
  if (kCluster > 1) name += "_cluster" + std::to_string(kCluster);
  if (kSchedule == Schedule::kPingpong) name += "_pingpong";
  if (kSchedule == Schedule::kStreamK) name += "_streamk";
  tiles.push_back({name, type_constant<T>(), 90, kRows, kColumns, Tile::Depth::value, kCluster,
                   kSchedule == Schedule::kStreamK, Tile::kBlocks.threads, Tile::kBlocks.shared_bytes,
                   reinterpret_cast<const void*>(&conv_sm90_kernel<Tile>),
                   &Tile::refusal, &Tile::workspace, &Tile::run});
}

template <int kRows, int kColumns, int kCluster, Schedule kSchedule, class... T>
void list_each_sm90(std::vector<ConvTile>& tiles) {
  (list_conv_sm90<T, kRows, kColumns, kCluster, kSchedule>(tiles), ...);
}

}  // namespace fastres

// The kernels of a file, which is called by them: the tile's rows and columns, cluster, schedule, element types.
#define FASTRES_LIST_SM90(NAME, ROWS, COLUMNS, CLUSTER, SCHEDULE, ...)                \
  void fastres::list_conv_sm90_##NAME(std::vector<ConvTile>& tiles) {                 \
    list_each_sm90<ROWS, COLUMNS, CLUSTER, Schedule::SCHEDULE, __VA_ARGS__>(tiles);   \
  }
