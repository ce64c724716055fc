// The functions of libnccl.so.2 and libcuda.so.1 that worker/nccl_library.h names, between threads
// of one process, over host memory. As the real ones do, it takes operations without waiting, says
// of a communicator that not all have joined "in progress", and refuses two ranks on one GPU. An
// operation goes on when its stream is asked about.
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5, kInProgress = 7;
constexpr int kNumGpus = 8;

struct UniqueId {
  char internal[128];
};

struct Group {
  std::set<int> ranks;
  std::set<void*> gpus;
  std::set<int> left;
  bool is_refused = false;
  // (from, to) → messages in order.
  std::map<std::pair<int, int>, std::deque<std::vector<char>>> mail;
};
struct Comm {
  std::shared_ptr<Group> group;
  int rank = 0;
  int size = 0;
  int error = kSuccess;
  bool is_aborted = false;  // what it enqueued ends, and moves nothing
};
struct Stream {
  // True when it is over.
  std::deque<std::function<bool()>> operations;
};

std::mutex mu;
std::condition_variable left;
std::map<std::array<char, 128>, std::shared_ptr<Group>> groups;
std::vector<std::unique_ptr<Comm>> comms;  // all there ever were: streams may still name them
uint64_t next_id = 1;
std::array<char, kNumGpus> contexts;
thread_local void* current = nullptr;

void Put(Comm& comm, int to, const void* from, size_t count) {
  const char* const bytes = static_cast<const char*>(from);
  comm.group->mail[{comm.rank, to}].emplace_back(bytes, bytes + count);
}
std::function<bool()> Take(Comm* comm, int from, void* to, size_t count) {
  return [=] {
    if (comm->is_aborted) return true;
    std::deque<std::vector<char>>& mail = comm->group->mail[{from, comm->rank}];
    if (mail.empty()) return false;
    if (mail.front().size() == count) {
      std::memcpy(to, mail.front().data(), count);
    } else {
      comm->error = kInvalidArgument;
    }
    mail.pop_front();
    return true;
  };
}

}  // namespace

extern "C" {

int ncclGetUniqueId(UniqueId* id) {
  const std::lock_guard<std::mutex> lock(mu);
  std::memset(id->internal, 0, sizeof(id->internal));
  std::memcpy(id->internal, &next_id, sizeof(next_id));
  ++next_id;
  return kSuccess;
}
int ncclCommInitRankConfig(void** out, int size, UniqueId id, int rank, void* config) {
  // size_t size, unsigned magic, version, int blocking
  unsigned magic = 0;
  std::memcpy(&magic, static_cast<char*>(config) + sizeof(size_t), sizeof(magic));
  if (magic != 0xcafebeef || current == nullptr) return kInvalidArgument;
  const std::lock_guard<std::mutex> lock(mu);
  std::array<char, 128> key;
  std::memcpy(key.data(), id.internal, key.size());
  std::shared_ptr<Group>& group = groups[key];
  if (group == nullptr) group = std::make_shared<Group>();
  const bool is_new = group->ranks.insert(rank).second && group->gpus.insert(current).second;
  if (!is_new) group->is_refused = true;
  comms.push_back(std::make_unique<Comm>(Comm{group, rank, size}));
  *out = comms.back().get();
  return kInProgress;
}
int ncclCommGetAsyncError(void* handle, int* result) {
  const std::lock_guard<std::mutex> lock(mu);
  const Comm& comm = *static_cast<Comm*>(handle);
  *result = comm.group->is_refused                                   ? kInvalidUsage
            : static_cast<int>(comm.group->ranks.size()) < comm.size ? kInProgress
                                                                     : comm.error;
  return kSuccess;
}
int ncclCommFinalize(void*) {
  return kSuccess;
}
// As between GPUs of one machine: waits for the other members to leave too, where a test asks for
// it.
int ncclCommDestroy(void* handle) {
  if (handle == nullptr) return kInvalidArgument;
  std::unique_lock<std::mutex> lock(mu);
  Comm& comm = *static_cast<Comm*>(handle);
  comm.group->left.insert(comm.rank);
  left.notify_all();
  if (std::getenv("EMULATED_NCCL_LEAVES_TOGETHER") == nullptr) return kSuccess;
  const bool have_all_left = left.wait_for(lock, std::chrono::seconds(20), [&] {
    return static_cast<int>(comm.group->left.size()) >= comm.size;
  });
  if (have_all_left) return kSuccess;
  std::fprintf(stderr, "rank %d waits in ncclCommDestroy for members that do not leave\n",
               comm.rank);
  std::abort();
}
int ncclCommAbort(void* handle) {
  if (handle == nullptr) return kInvalidArgument;
  const std::lock_guard<std::mutex> lock(mu);
  Comm& comm = *static_cast<Comm*>(handle);
  comm.is_aborted = true;
  comm.group->left.insert(comm.rank);
  left.notify_all();
  return kSuccess;
}
const char* ncclGetErrorString(int result) {
  return result == kInvalidUsage ? "invalid usage (Duplicate GPU detected)" : "invalid argument";
}
int ncclBroadcast(const void* from, void* to, size_t count, int, int root, void* handle,
                  void* stream) {
  const std::lock_guard<std::mutex> lock(mu);
  Comm* const comm = static_cast<Comm*>(handle);
  if (comm->rank != root) {
    static_cast<Stream*>(stream)->operations.push_back(Take(comm, root, to, count));
    return kSuccess;
  }
  for (int rank = 0; rank < comm->size; ++rank) {
    if (rank != root) Put(*comm, rank, from, count);
  }
  return kSuccess;
}
int ncclSend(const void* from, size_t count, int, int peer, void* handle, void*) {
  const std::lock_guard<std::mutex> lock(mu);
  Put(*static_cast<Comm*>(handle), peer, from, count);
  return kSuccess;
}
int ncclRecv(void* to, size_t count, int, int peer, void* handle, void* stream) {
  const std::lock_guard<std::mutex> lock(mu);
  static_cast<Stream*>(stream)->operations.push_back(
      Take(static_cast<Comm*>(handle), peer, to, count));
  return kInProgress;
}

int cuInit(unsigned) {
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = kNumGpus;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[static_cast<size_t>(device)];
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) {
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
int cuStreamCreate(void** stream, unsigned) {
  *stream = new Stream;
  return 0;
}
int cuStreamDestroy_v2(void* stream) {
  delete static_cast<Stream*>(stream);
  return 0;
}
int cuStreamQuery(void* handle) {
  const std::lock_guard<std::mutex> lock(mu);
  std::deque<std::function<bool()>>& operations = static_cast<Stream*>(handle)->operations;
  while (!operations.empty() && operations.front()()) operations.pop_front();
  return operations.empty() ? 0 : 600;
}

}  // extern "C"
