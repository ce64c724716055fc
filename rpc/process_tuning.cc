#include "rpc/process_tuning.h"

#include <errno.h>
#include <malloc.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>

#include <algorithm>

#include "base/log.h"

namespace pagetide {

void TuneProcess(const ProcessTuning& tuning) {
  // mallopt returns 1 on success.
  if (mallopt(M_TRIM_THRESHOLD, tuning.malloc_keep_bytes) != 1 ||
      mallopt(M_MMAP_THRESHOLD, std::min(tuning.malloc_keep_bytes, 32 << 20)) != 1) {
    LogWarning("rpc", "set malloc thresholds to ", tuning.malloc_keep_bytes, " bytes: refused");
  }
  // A peer that went away must end a write with EPIPE, not the process.
  signal(SIGPIPE, SIG_IGN);
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const rlim_t wanted = std::min<rlim_t>(limit.rlim_max, tuning.max_descriptors);
  if (limit.rlim_cur >= wanted) return;
  limit.rlim_cur = wanted;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
    LogWarning("rpc", "raise the descriptor limit to ", wanted, ": ", strerror(errno));
  }
}

uint64_t DescriptorLimit() {
  rlimit limit{};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : 1024;
}

}  // namespace pagetide
