// The CUDA kernels, their launch arithmetic and the maths of one element behind a C interface, for ctypes: compiled and linked
// with csrc/cuda's kernels by tests/emulation/emulation.py, with an ordinary C++ compiler against the emulator's headers.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/add_relu.h"
#include "cuda/bn_act.h"

namespace {

std::string problem;

template <class F>
const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

fastres::Tiling tiling;

template <int U>
void at_once(const fastres::Place& p, int64_t row_tile, int64_t* out) {
  int64_t found[U];
  tiling.offsets<U>(p, row_tile, found);
  std::memcpy(out, found, sizeof found);
}

}  // namespace

extern "C" {

// ---- Kernels. A message, or null. `sms`: the GPU's multiprocessors.

void set_backwards(int backwards) { emulator::backwards = backwards != 0; }

int take_launches() {
  const int launches = emulator::launches;
  emulator::launches = 0;
  return launches;
}

const char* add_relu(int type, void* x, void* residual, void* y, int64_t n, int sms) {
  return guarded([&] { fastres::add_relu_forward(fastres::Type(type), x, residual, y, n, {sms, nullptr}); });
}

const char* add_relu_backward(int type, void* dy, void* y, void* dx, int64_t n, int sms) {
  return guarded([&] { fastres::add_relu_gradient(fastres::Type(type), dy, y, dx, n, {sms, nullptr}); });
}

const char* bn_act(int type, int64_t batch, int64_t channels, int64_t plane, int channels_last, void* x, void* residual,
                   void* y, float* weight, float* bias, float* mean, float* var, float* running_mean,
                   float* running_var, int64_t* count, float momentum, float eps, int relu, int training, int sms) {
  return guarded([&] {
    const fastres::Stream on{sms, nullptr};
    fastres::Forward f{fastres::Type(type), fastres::View::of(batch, channels, plane, channels_last), x, residual, y,
                       weight, bias, mean, var, nullptr, nullptr, eps, relu != 0};
    if (training) {
      std::vector<float> scratch(fastres::statistics_scratch(f, on), NAN);
      fastres::bn_statistics(f, {mean, var, running_mean, running_var, count, momentum}, scratch.data(), on);
    } else {
      f.mean = running_mean;
      f.var = running_var;
      f.mean_copy = mean;
      f.var_copy = var;
    }
    fastres::bn_act_apply(f, on);
  });
}

const char* bn_act_backward(int type, int64_t batch, int64_t channels, int64_t plane, int channels_last, void* dy,
                            void* x, void* y, float* weight, float* mean, float* var, void* dx, float* dweight,
                            float* dbias, void* dresidual, float eps, int training, int sms) {
  return guarded([&] {
    const fastres::Stream on{sms, nullptr};
    const fastres::Backward b{fastres::Type(type), fastres::View::of(batch, channels, plane, channels_last), dy, x, y,
                              weight, mean, var, dx, dresidual, dweight, dbias, eps, training != 0};
    std::vector<float> scratch(b.needs_sums() ? fastres::sums_scratch(b, on) : 0, NAN);
    fastres::bn_act_gradients(b, scratch.data(), on);
  });
}

// ---- Launch arithmetic.

void flat(int64_t n, uint64_t address, int64_t size, int lanes, int64_t* out) {  // head, vectors, tail, blocks
  const fastres::Flat f = fastres::Flat::of(n, address, size, lanes);
  const int64_t values[] = {f.head, f.vectors, f.tail, f.blocks(4)};
  std::memcpy(out, values, sizeof values);
}

// Where the threads of a block begin: vectors [threads * unroll], -1 for none; single elements [threads], likewise.
void flat_block(int64_t n, uint64_t address, int64_t size, int lanes, int unroll, int64_t block, int64_t* vectors,
                int64_t* singles) {
  const fastres::Flat f = fastres::Flat::of(n, address, size, lanes);
  for (int thread = 0; thread < fastres::kThreads; ++thread) {
    for (int u = 0; u < unroll; ++u) {
      const int64_t vector = f.vector(block, thread, u, unroll);
      vectors[thread * unroll + u] = vector < f.vectors ? f.offset(vector, lanes) : -1;
    }
    singles[thread] = block == 0 && lanes > 1 ? f.single(thread, lanes) : -1;
  }
}

uint32_t fast_divide(uint32_t n, int64_t divisor) { return fastres::FastDivide::by(divisor).divide(n); }

// Makes the tiling that the functions below speak of.
void plan(int64_t batch, int64_t channels, int64_t plane, int channels_last, int64_t size, int aligned, int unroll,
          int64_t widest, int64_t wanted, int64_t* out) {
  const fastres::View view = fastres::View::of(batch, channels, plane, channels_last != 0);
  const int lanes = view.lanes(size, aligned != 0);
  tiling = fastres::Tiling::of(view, lanes, unroll, widest / lanes, wanted);
  const int64_t values[] = {tiling.lanes,  tiling.width,  tiling.height, tiling.tiles,          tiling.splits,
                            tiling.span,   tiling.rows,   tiling.line,   tiling.chunks.divisor, tiling.row_tiles,
                            tiling.blocks(), tiling.threads()};
  std::memcpy(out, values, sizeof values);
}

// Counts what every lane of every thread meets: hits [numel], and its channel by the kernels' arithmetic.
void cover(int32_t* hits, int64_t* channel_of) {
  for (int64_t block = 0; block < tiling.blocks(); ++block) {
    for (int thread = 0; thread < tiling.threads(); ++thread) {
      const fastres::Place p = tiling.place(block, thread);
      const fastres::Channels channels = tiling.channels_of(p);
      for (int64_t i = p.split; i < tiling.row_tiles; i += tiling.splits) {
        int64_t offsets[8];
        switch (tiling.unroll) {
          case 2:
            at_once<2>(p, i, offsets);
            break;
          case 4:
            at_once<4>(p, i, offsets);
            break;
          default:
            at_once<8>(p, i, offsets);
        }
        for (int u = 0; u < tiling.unroll; ++u) {
          const int64_t offset = offsets[u];
          for (int k = 0; offset >= 0 && k < tiling.lanes; ++k) {
            ++hits[offset + k];
            channel_of[offset + k] = tiling.has_work(p) ? channels.of(k) : -1;
          }
        }
      }
    }
  }
}

int64_t element(int64_t block, int thread, int64_t row_tile, int u) {
  const fastres::Place p = tiling.place(block, thread);
  int64_t found[4];
  at_once<4>(p, row_tile, found);
  const int64_t alone = tiling.offset(p, tiling.row(p, row_tile, u));
  return tiling.unroll == 4 && found[u] != alone ? -2 : alone;
}
int64_t channel(int64_t block, int thread, int lane) {
  return tiling.channels_of(tiling.place(block, thread)).of(lane);
}

// ---- The maths of one element, over arrays.

void relu(const float* z, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = fastres::activate(z[i], 0.f);
}
void relu_gradient(const float* dy, const float* y, float* dx, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dx[i] = fastres::relu_gradient(dy[i], y[i]);
}
void affine(const float* x, float mean, float scale, float bias, float* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = fastres::affine(x[i], mean, scale, bias);
}
void input_gradient(const float* g, const float* x, float mean, float scale, float mean_g, float slope, float* dx,
                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) dx[i] = fastres::input_gradient(g[i], x[i], mean, scale, mean_g, slope);
}
void reciprocal_std(const float* var, float eps, float* rstd, int64_t n) {
  for (int64_t i = 0; i < n; ++i) rstd[i] = fastres::reciprocal_std(var[i], eps);
}
// count, mean and m2 of `parts` recurrences over x[i], i modulo parts, merged in order; four values at once, or one.
void welford(const float* x, int64_t n, int64_t parts, int at_once, float* out) {
  float count = 0, mean = 0, m2 = 0;
  for (int64_t part = 0; part < parts; ++part) {
    float own = 0, own_mean = 0, own_m2 = 0;
    int64_t i = part;
    for (; at_once && i + 3 * parts < n; i += 4 * parts) {
      const float four[] = {x[i], x[i + parts], x[i + 2 * parts], x[i + 3 * parts]};
      if (own == 0) own_mean = four[0];
      own += 4;
      fastres::Welford::add(four, 1 / own, own_mean, own_m2);
    }
    for (; i < n; i += parts) {
      own += 1;
      fastres::Welford::add(x[i], 1 / own, own_mean, own_m2);
    }
    fastres::Welford::merge(count, mean, m2, own, own_mean, own_m2);
  }
  out[0] = count;
  out[1] = mean;
  out[2] = fastres::settled_m2(mean, m2);
}

}  // extern "C"
