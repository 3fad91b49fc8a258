// bn_act's launches as functions of pointers. Formulas in element.h.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace fastres {

// The statistics of a batch and what follows from them, per channel. Parameters are [C] in fp32, or null.
struct Statistics {
  float *mean, *var;                   // written; biased
  float *running_mean, *running_var;   // moved
  int64_t* num_batches_tracked;        // one more
  float momentum;
};

struct Forward {
  Type type;
  View view;
  const void *x, *residual;  // residual: null, or x itself, or another
  void* y;
  const float *weight, *bias;
  const float *mean, *var;       // normalized with
  float *mean_copy, *var_copy;   // written, or null
  float eps;
  bool relu;
};

struct Backward {
  Type type;
  View view;
  const void *dy, *x, *y;  // y: null without ReLU
  const float *weight, *mean, *var;
  void *dx, *dresidual;   // null: not wanted
  float *dweight, *dbias;  // null: not wanted
  float eps;
  bool training;

  bool needs_sums() const { return (training && dx) || dweight || dbias; }
};

// Floats of scratch memory that the reduction of a training forward, or of a backward that needs sums, takes.
int64_t statistics_scratch(const Forward& f, const Stream& on);
int64_t sums_scratch(const Backward& b, const Stream& on);

// mean and var of x: two launches.
void bn_statistics(const Forward& f, const Statistics& s, float* scratch, const Stream& on);
// y: one launch.
void bn_act_apply(const Forward& f, const Stream& on);
// The wanted gradients: at most three launches.
void bn_act_gradients(const Backward& b, float* scratch, const Stream& on);

}  // namespace fastres
