// Where a block is in its cluster: hopper::place says.
#pragma once

#define block_id_in_cluster device_block_id_in_cluster
#include_next <cute/arch/cluster_sm90.hpp>
#undef block_id_in_cluster

namespace cute {
inline dim3 block_id_in_cluster() { return hopper::place.block_in_cluster; }
}  // namespace cute
