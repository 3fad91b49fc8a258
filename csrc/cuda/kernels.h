// What module.cpp asks of the CUDA half. Includes nothing of CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastres {

struct KernelAttributes {
  std::string name;
  int registers;         // a thread
  int64_t shared_bytes;  // a block
  int64_t local_bytes;   // a thread: spills
  int threads;           // a full block
  int blocks;            // that fit a multiprocessor at once
  int architecture;      // of the code that runs here: 90
};

// Of every kernel, on the current device; empty where there is none.
std::vector<KernelAttributes> kernel_attributes();

int cuda_version();  // of the headers: 13000

}  // namespace fastres
