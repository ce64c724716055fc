// Settings of the whole process that the bulk path needs. Called once by each main, before threads
// start.
#ifndef PAGETIDE_RPC_PROCESS_TUNING_H_
#define PAGETIDE_RPC_PROCESS_TUNING_H_

#include <cstddef>
#include <cstdint>

namespace pagetide {

struct ProcessTuning {
  // glibc gives a freed block back to the kernel, and maps large blocks afresh, at 128 KiB by
  // default: every 2 MiB page then pays for its page faults. Blocks up to this size stay with the
  // process.
  int malloc_keep_bytes = 64 << 20;
  // The soft limit of descriptors is raised to the hard limit, at most to this.
  uint64_t max_descriptors = 65536;
};

// Never fails: what the system refuses stays as it was and is logged.
void TuneProcess(const ProcessTuning& tuning = {});

// The soft limit of descriptors now in force.
uint64_t DescriptorLimit();

}  // namespace pagetide

#endif  // PAGETIDE_RPC_PROCESS_TUNING_H_
