// What the convolutions for sm_90a hand to the copy engine, on a machine without a GPU: the shipped tiles of
// csrc/cuda/conv_sm90_*.cu, compiled by the C++ compiler with tests/emulation/native/hopper in front of CUTLASS. The descriptors
// of a launch, the work of each block, and every copy that a block's loading warp issues for a piece of it.
// tests/emulation/test_conv_launch.py holds them against the driver's rules and plain division.
#include "hopper/host.h"

#include "cuda/conv_sm90.cuh"

namespace {

using namespace fastres;
using cute::get, cute::shape, cute::size;

struct Work {
  int64_t block, row_tile, column_tile, batch, step, steps, last;  // last: this block writes the tile
};

struct Tile {
  Type type;
  int64_t rows, columns, depth, cluster, stages, threads, shared_bytes, splits_depth, pingpong;
  std::string (*refusal)(const ConvShape&);
  int64_t (*workspace)(const ConvShape&, int multiprocessors);
  void (*launch)(const ConvShape&, const ConvTensors&, int multiprocessors, int clusters, int64_t* out);
  void (*work)(std::vector<Work>&);
  void (*load)(int row_tile, int column_tile, int step, int steps, int rank);
};

template <class Case>
struct Launch {
  using Kernel = typename Case::Kernel;
  using Mainloop = typename Case::Mainloop;
  using Scheduler = typename Kernel::TileScheduler;
  using Shared = typename Kernel::SharedStorage;
  static constexpr bool kStreamK = std::is_same_v<typename Case::Scheduler, cutlass::gemm::StreamKScheduler>;

  static inline typename Kernel::Params params;
  static inline dim3 grid;

  // As run() does, up to the launch. Out: the grid and the descriptors of x, the weight, the residual and y.
  static void launch(const ConvShape& shape, const ConvTensors& tensors, int multiprocessors, int clusters,
                     int64_t* out) {
    auto arguments = Case::arguments(shape.as_line(), tensors, multiprocessors);
    arguments.hw_info.max_active_clusters = clusters;
    hopper::descriptors.clear();
    params = Kernel::to_underlying_arguments(arguments, nullptr);
    grid = Kernel::get_grid_shape(params);
    out[0] = grid.x;
    out[1] = grid.y;
    out[2] = grid.z;
    out[3] = hopper::index_of(params.mainloop.tma_load_a.get_tma_descriptor());
    out[4] = hopper::index_of(params.mainloop.tma_load_b.get_tma_descriptor());
    out[5] = hopper::index_of(params.epilogue.tma_load_c.get_tma_descriptor());
    out[6] = hopper::index_of(params.epilogue.tma_store_d.get_tma_descriptor());
  }

  // The loops of the kernels, for each block of the grid: a tile after the other, or a part of one.
  static void work(std::vector<Work>& found) {
    found.clear();
    const Scheduler scheduler = [] {
      Scheduler s;
      s.scheduler_params = params.scheduler;
      return s;
    }();
    const bool along = params.scheduler.raster_order_ == Scheduler::RasterOrder::AlongN;
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        hopper::place.block_in_cluster = dim3(x % size<0>(typename Case::Cluster{}), 0, 0);
        uint64_t linear = along ? x + uint64_t{y} * grid.x : uint64_t{x} * grid.y + y;
        for (;; linear += uint64_t{grid.x} * grid.y * grid.z) {
          if constexpr (kStreamK) {
            uint32_t start = 0;
            auto info = Scheduler::get_current_work_for_linear_idx(start, linear, hopper::place.block_in_cluster,
                                                                   params.scheduler);
            if (!info.is_valid()) break;
            do {
              note(found, x + uint64_t{y} * grid.x, info);
            } while (Scheduler::continue_current_work_for_linear_idx(linear, start, hopper::place.block_in_cluster,
                                                                     info, params.scheduler));
          } else {
            const auto info = scheduler.get_current_work_for_linear_idx(linear);
            if (!info.is_valid()) break;
            note(found, x + uint64_t{y} * grid.x, info);
          }
        }
      }
    }
  }
  template <class Info>
  static void note(std::vector<Work>& found, uint64_t block, const Info& info) {
    typename Case::Tile tile;
    found.push_back({static_cast<int64_t>(block), info.M_idx, info.N_idx, info.L_idx,
                     Scheduler::get_work_k_tile_start(info),
                     Scheduler::get_work_k_tile_count(info, params.problem_shape, tile),
                     Scheduler::compute_epilogue(info, params.scheduler)});
    if (!Scheduler::valid_warpgroup_in_work_tile(info)) found.back().steps = 0;
  }

  // The loading warp on one piece of work, as in both kernels; `rank`: the block's in its cluster.
  static void load(int row_tile, int column_tile, int step, int steps, int rank) {
    alignas(1024) static char memory[sizeof(Shared)];  // nothing is written to it
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    hopper::copies.clear();
    hopper::place.shared = memory;
    hopper::place.block_in_cluster = dim3(static_cast<unsigned>(rank), 0, 0);
    Mainloop mainloop;
    const auto inputs = mainloop.load_init(params.problem_shape, params.mainloop);
    const auto a = get<0>(inputs);
    const auto b = get<1>(inputs);
    const auto coordinate =
        cute::make_coord(cute::idx2crd(row_tile, shape<2>(a)), cute::idx2crd(column_tile, shape<2>(b)), cute::_,
                         cute::idx2crd(0, shape<4>(b)));
    auto steps_of = shape<3>(a);  // the kernels' iterator refers to it, and it is gone when load() is called
    const auto first = cute::make_coord_iterator(cute::idx2crd(step, steps_of), steps_of);
    steps_of = cute::repeat_like(steps_of, 1);
    typename Mainloop::MainloopPipeline::Params about;
    about.role = Mainloop::MainloopPipeline::ThreadCategory::Producer;
    about.transaction_bytes = params.mainloop.tma_transaction_bytes;
    about.num_consumers = Kernel::NumMMAThreads;
    typename Mainloop::MainloopPipeline pipeline(shared.pipelines.mainloop, about, typename Case::Cluster{});
    const auto state = cutlass::make_producer_start_state<typename Mainloop::MainloopPipeline>();
    mainloop.load(params.mainloop, pipeline, state, inputs, coordinate, first, steps, 0, static_cast<uint32_t>(rank),
                  shared.tensors.mainloop);
  }

};

std::vector<Tile> all;

template <class T, int kRows, int kColumns, int kCluster, Schedule kSchedule>
void note_conv_sm90(std::vector<ConvTile>&) {
  using Case = Sm90<T, kRows, kColumns, kCluster, kSchedule>;
  using L = Launch<Case>;
  all.push_back({type_constant<T>(), kRows, kColumns, Case::Depth::value, kCluster, Case::kStages,
                 Case::Kernel::MaxThreadsPerBlock, Case::Kernel::SharedStorageSize, kSchedule == Schedule::kStreamK,
                 kSchedule == Schedule::kPingpong, &Case::refusal, &Case::workspace, &L::launch, &L::work});
  if constexpr (!std::is_same_v<T, BFloat16>) all.back().load = &L::load;  // all but its name is Half's: slow to compile
}

}  // namespace

// The shipped lists of tiles.
#define list_conv_sm90 note_conv_sm90
#include "cuda/conv_sm90_128x128.cu"
#include "cuda/conv_sm90_128x256.cu"
#include "cuda/conv_sm90_128x64.cu"
#include "cuda/conv_sm90_256x128.cu"
#include "cuda/conv_sm90_64x128.cu"
#include "cuda/conv_sm90_streamk.cu"
#include "cuda/conv_tiles.cu"
#include "hopper/driver.h"

// ---- For Python: everything as arrays of int64.

namespace {

const std::vector<Tile>& tiles() {
  if (all.empty()) conv_tiles();
  return all;
}

ConvShape shape_of(const int64_t* s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], {s[9], s[10]}, {s[11], s[12]}, {s[13], s[14]}};
}

template <class Row>
int64_t give(const std::vector<Row>& rows, int64_t* out, int64_t most) {
  const auto count = static_cast<int64_t>(rows.size());
  if (count <= most) std::memcpy(out, rows.data(), rows.size() * sizeof(Row));
  return count;
}

std::vector<Work> pieces;
std::string reason;

}  // namespace

extern "C" {

int64_t tile_count() { return static_cast<int64_t>(tiles().size()); }

// type, rows, columns, depth, cluster, stages, threads, shared bytes, streamk, pingpong
void tile(int64_t i, int64_t* out) {
  const Tile& t = tiles()[i];
  *out = static_cast<int64_t>(t.type);
  std::memcpy(out + 1, &t.rows, 9 * sizeof(int64_t));
}

const char* refusal(int64_t i, const int64_t* shape) {
  reason = tiles()[i].refusal(shape_of(shape));
  return reason.c_str();
}
int64_t workspace(int64_t i, const int64_t* shape, int64_t multiprocessors) {
  return tiles()[i].workspace(shape_of(shape), static_cast<int>(multiprocessors));
}

// Addresses: x, weight, bias, residual, y. Clusters: that the device holds at once, 0 where blocks stand alone. Out:
// see Launch::launch.
void launch(int64_t i, const int64_t* shape, const int64_t* addresses, int64_t multiprocessors, int64_t clusters,
            int64_t* out) {
  const auto at = [&](int k) { return reinterpret_cast<void*>(addresses[k]); };
  tiles()[i].launch(shape_of(shape), {at(0), at(1), at(2), at(3), at(4), 0, 6}, static_cast<int>(multiprocessors),
                    static_cast<int>(clusters), out);
}
int64_t descriptors(int64_t* out, int64_t most) { return give(hopper::descriptors, out, most); }

int64_t work(int64_t i, int64_t* out, int64_t most) {
  if (most == 0) tiles()[i].work(pieces);
  return give(pieces, out, most);
}

int64_t load(int64_t i, int64_t row_tile, int64_t column_tile, int64_t step, int64_t steps, int64_t rank, int64_t* out,
             int64_t most) {
  tiles()[i].load(static_cast<int>(row_tile), static_cast<int>(column_tile), static_cast<int>(step),
                  static_cast<int>(steps), static_cast<int>(rank));
  return give(hopper::copies, out, most);
}
}
