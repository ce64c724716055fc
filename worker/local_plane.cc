#include "worker/local_plane.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/status_macros.h"
#include "pagetide/v1/local_plane.pb.h"
#include "worker/local_plane_wire.h"

namespace pagetide {
namespace {

constexpr uint32_t kVersion = 1;
constexpr int kPollMilliseconds = 250;

void StoreLength(uint32_t length, char* bytes) {
  for (int i = 0; i < 4; ++i) bytes[i] = static_cast<char>(length >> (8 * i));
}

absl::Status SystemError(absl::string_view action, absl::string_view object) {
  return absl::FailedPreconditionError(absl::StrCat(action, " ", object, ": ", strerror(errno)));
}

uint64_t RandomId() {
  uint64_t id = 0;
  while (id == 0) {
    if (getrandom(&id, sizeof(id), 0) != sizeof(id)) id = 0;
  }
  return id;
}

// A socket that nobody listens on any more is removed; anything else at the path stays.
absl::Status RemoveDeadSocket(const std::string& path, const sockaddr_un& address) {
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : SystemError("look at", path);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat("listen on ", path, ": there is a file that is not a socket"));
  }
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (probe < 0) return SystemError("probe", path);
  const bool is_dead =
      connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 &&
      errno == ECONNREFUSED;
  close(probe);
  if (!is_dead) {
    return absl::FailedPreconditionError(
        absl::StrCat("listen on ", path, ": another process listens there"));
  }
  if (unlink(path.c_str()) != 0) return SystemError("remove", path);
  return absl::OkStatus();
}

// One message and its descriptors in one sendmsg. False when it did not go out whole.
bool SendWelcome(int fd, const v1::LocalWelcome& welcome, const std::vector<int>& fds) {
  std::string frame(kLocalLengthBytes, '\0');
  StoreLength(static_cast<uint32_t>(welcome.ByteSizeLong()), frame.data());
  welcome.AppendToString(&frame);
  iovec part{frame.data(), frame.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  std::vector<char> control;
  if (!fds.empty()) {
    const size_t bytes = fds.size() * sizeof(int);
    control.resize(CMSG_SPACE(bytes));
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(bytes);
    std::memcpy(CMSG_DATA(header), fds.data(), bytes);
  }
  return sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(frame.size());
}

static_assert(static_cast<int>(PoolExport::Kind::kNone) == v1::LocalMemory::KIND_UNSPECIFIED &&
              static_cast<int>(PoolExport::Kind::kMemfd) == v1::LocalMemory::KIND_MEMFD &&
              static_cast<int>(PoolExport::Kind::kCudaVmm) == v1::LocalMemory::KIND_CUDA_VMM &&
              static_cast<int>(PoolExport::Kind::kCudaIpc) == v1::LocalMemory::KIND_CUDA_IPC);

// Says what kind of memory a pool is, and hands it over to a client that understands the kind. The
// descriptor that is to go with the welcome, or -1.
int Announce(const PoolExport& exported, const v1::LocalHello& hello,
             v1::LocalWelcome::Pool* pool) {
  const auto kind = static_cast<v1::LocalMemory::Kind>(exported.kind);
  pool->set_kind(kind);
  if (exported.kind == PoolExport::Kind::kNone) {
    pool->set_why_not(exported.why_not);
    return -1;
  }
  if (exported.kind == PoolExport::Kind::kMemfd) {
    pool->set_has_fd(true);
    return exported.fd;
  }
  if (std::find(hello.pool_kinds().begin(), hello.pool_kinds().end(), kind) ==
      hello.pool_kinds().end()) {
    pool->set_why_not(absl::StrCat("the frames lie in a GPU, and the hello does not name ",
                                   v1::LocalMemory::Kind_Name(kind), " in pool_kinds"));
    return -1;
  }
  pool->set_mapped_bytes(exported.mapped_bytes);
  pool->set_device_uuid(exported.device_uuid);
  if (exported.kind == PoolExport::Kind::kCudaIpc) {
    pool->set_ipc_handle(exported.ipc_handle);
    return -1;
  }
  pool->set_has_device_fd(true);
  return exported.fd;
}

void CountPool(Metrics& metrics, const v1::LocalWelcome::Pool& pool) {
  const std::string lent = pool.has_fd()                ? "memfd"
                           : pool.has_device_fd()       ? "cuda_vmm"
                           : !pool.ipc_handle().empty() ? "cuda_ipc"
                                                        : "none";
  metrics
      .GetCounter("pagetide_local_pools_total",
                  "Pools that clients on this host asked to map, by what they were given",
                  {{"lent", lent}})
      ->Increment();
}

void Refuse(int fd, absl::string_view why) {
  v1::LocalWelcome welcome;
  welcome.set_error(std::string(why));
  SendWelcome(fd, welcome, {});
}

}  // namespace

absl::StatusOr<std::unique_ptr<LocalPlane>> LocalPlane::Create(Options options, Worker* worker) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (options.socket_path.empty() || options.socket_path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(
        absl::StrCat("local socket path has ", options.socket_path.size(),
                     " bytes, must have 1 to ", sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, options.socket_path.data(), options.socket_path.size());
  PT_RETURN_IF_ERROR(RemoveDeadSocket(options.socket_path, address));
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener < 0) return SystemError("create socket", options.socket_path);
  // Owner only: whoever may connect may read the pools. The mode is set before anyone can connect.
  if (bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      chmod(options.socket_path.c_str(), 0600) != 0 || listen(listener, 64) != 0) {
    const absl::Status status = SystemError("listen on", options.socket_path);
    close(listener);
    return status;
  }
  const int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake < 0) {
    const absl::Status status = SystemError("create event for", options.socket_path);
    close(listener);
    return status;
  }
  return std::unique_ptr<LocalPlane>(new LocalPlane(std::move(options), worker, listener, wake));
}

LocalPlane::LocalPlane(Options options, Worker* worker, int listen_fd, int wake_fd)
    : options_(std::move(options)), worker_(worker), listen_fd_(listen_fd), wake_fd_(wake_fd) {
  thread_ = std::thread([this] { Run(); });
}

LocalPlane::~LocalPlane() {
  const uint64_t one = 1;
  // An eventfd whose counter is not near its limit takes the write at once.
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof(one));
  thread_.join();
  for (const Connection& connection : connections_) {
    close(connection.fd);
    DropClient(connection.client_id);
  }
  close(listen_fd_);
  close(wake_fd_);
  unlink(options_.socket_path.c_str());
}

void LocalPlane::Run() {
  pthread_setname_np(pthread_self(), "local-plane");
  std::vector<pollfd> polled;
  for (;;) {
    polled.clear();
    polled.push_back({wake_fd_, POLLIN, 0});
    polled.push_back({listen_fd_, POLLIN, 0});
    for (const Connection& c : connections_) polled.push_back({c.fd, POLLIN | POLLRDHUP, 0});
    const int ready = poll(polled.data(), polled.size(), kPollMilliseconds);
    if (ready < 0 && errno != EINTR) {
      LogError("worker", "local plane: poll: ", strerror(errno));
      return;
    }
    if (polled[0].revents != 0) return;
    const MonotonicTime now = worker_->clock().MonotonicNow();
    std::vector<Connection> kept;
    kept.reserve(connections_.size());
    for (size_t i = 0; i < connections_.size(); ++i) {
      Connection& connection = connections_[i];
      const bool timed_out = connection.client_id == 0 && connection.handshake_ends < now;
      const bool is_open = !timed_out && (polled[i + 2].revents == 0 || Receive(&connection));
      if (is_open) {
        kept.push_back(std::move(connection));
        continue;
      }
      close(connection.fd);
      DropClient(connection.client_id);
    }
    connections_ = std::move(kept);
    if (polled[1].revents != 0) Accept();
    DropExpired();
  }
}

void LocalPlane::Accept() {
  for (;;) {
    const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
        LogWarning("worker", "local plane: accept: ", strerror(errno));
        absl::SleepFor(absl::Milliseconds(50));  // out of descriptors: do not spin
      }
      return;
    }
    if (connections_.size() >= options_.max_clients) {
      Refuse(fd,
             absl::StrCat("this worker serves at most ", options_.max_clients, " local clients"));
      close(fd);
      continue;
    }
    connections_.push_back({fd,
                            worker_->clock().MonotonicNow() + options_.handshake_timeout,
                            {},
                            0,
                            ReceivedFds(&fd_closer_)});
  }
}

bool LocalPlane::Receive(Connection* connection) {
  const ssize_t n = ReceiveWithFds(connection->fd, kLocalLengthBytes + kMaxLocalHelloBytes,
                                   !fd_closer_.is_full(), &connection->received, &connection->fds);
  if (n < 0) return errno == EAGAIN || errno == EINTR;
  // Nothing is said after the welcome, so bytes then are as much an end as the end itself.
  if (n == 0 || connection->client_id != 0) return false;
  const auto hello = ParseLocalHello(connection->received);
  if (!hello.ok()) return false;
  if (!hello->has_value()) return true;
  connection->received.clear();
  // What was mapped stays so without its descriptor.
  const ReceivedFds fds = std::move(connection->fds);
  return Welcome(connection, **hello, fds);
}

bool LocalPlane::CanImport(v1::LocalMemory::Kind kind) const {
  return (kind == v1::LocalMemory::KIND_CUDA_VMM || kind == v1::LocalMemory::KIND_CUDA_IPC) &&
         worker_->device().CanImport(static_cast<PoolExport::Kind>(kind));
}

absl::StatusOr<std::shared_ptr<const EngineMemory>> LocalPlane::MapMemory(
    const v1::LocalMemory& memory, int fd) const {
  if (memory.kind() == v1::LocalMemory::KIND_MEMFD) {
    return EngineMemory::Map(fd, memory.size_bytes());
  }
  PT_ASSIGN_OR_RETURN(ImportedPeerMemory imported,
                      worker_->device().Import({static_cast<PoolExport::Kind>(memory.kind()), fd,
                                                memory.ipc_handle(), memory.size_bytes()}));
  return EngineMemory::OnDevice(std::move(imported.mapping), imported.data, memory.size_bytes());
}

absl::StatusOr<EngineLayout::Memories> LocalPlane::MapMemories(const v1::LocalHello& hello,
                                                               const ReceivedFds& fds) const {
  EngineLayout::Memories memories;
  if (static_cast<size_t>(hello.memories_size()) > kMaxLocalMemories) {
    return absl::InvalidArgumentError(absl::StrCat("memories has ", hello.memories_size(),
                                                   " entries, at most ", kMaxLocalMemories));
  }
  uint64_t total = 0;
  size_t num_fds = 0;
  for (int i = 0; i < hello.memories_size(); ++i) {
    const v1::LocalMemory& memory = hello.memories(i);
    const bool is_host = memory.kind() == v1::LocalMemory::KIND_MEMFD;
    if (!is_host && !CanImport(memory.kind())) {
      return absl::UnimplementedError(absl::StrCat(
          "memories[", i, "].kind is ", v1::LocalMemory::Kind_Name(memory.kind()),
          "; this worker's device is ", worker_->device_name(), ", it takes KIND_MEMFD only"));
    }
    if (memory.size_bytes() > options_.max_engine_bytes - total) {
      return absl::ResourceExhaustedError(
          absl::StrCat("memories[", i, "].size_bytes is ", memory.size_bytes(), " after ", total,
                       " bytes, a client may hand over ", options_.max_engine_bytes));
    }
    total += memory.size_bytes();
    if (memory.kind() != v1::LocalMemory::KIND_CUDA_IPC) ++num_fds;
  }
  if (fds.size() != num_fds) {
    return absl::InvalidArgumentError(absl::StrCat(
        "memories has ", num_fds, " entries with a descriptor, ", fds.size(), " descriptors came"));
  }
  size_t next_fd = 0;
  for (int i = 0; i < hello.memories_size(); ++i) {
    const v1::LocalMemory& memory = hello.memories(i);
    const int fd = memory.kind() == v1::LocalMemory::KIND_CUDA_IPC ? -1 : fds[next_fd++];
    auto mapped = MapMemory(memory, fd);
    if (!mapped.ok()) {
      return absl::Status(mapped.status().code(),
                          absl::StrCat("memories[", i, "]: ", mapped.status().message()));
    }
    memories.push_back(*std::move(mapped));
  }
  return memories;
}

bool LocalPlane::Welcome(Connection* connection, const v1::LocalHello& hello,
                         const ReceivedFds& received) {
  if (hello.version() != kVersion) {
    Refuse(connection->fd, absl::StrCat("version ", hello.version(), " is not ", kVersion));
    return false;
  }
  v1::LocalWelcome welcome;
  std::vector<int> fds;
  auto staging = StagingBuffer::Create(
      std::clamp<uint64_t>(hello.staging_bytes(), 1, options_.max_staging_bytes));
  if (!staging.ok()) {
    Refuse(connection->fd, staging.status().message());
    return false;
  }
  auto memories = MapMemories(hello, received);
  if (!memories.ok()) {
    Refuse(connection->fd, memories.status().message());
    return false;
  }
  welcome.set_num_memories(static_cast<uint32_t>(memories->size()));
  fds.push_back((*staging)->fd());
  if (!hello.model_digest().empty()) {
    const auto host = worker_->HostOfModel(
        hello.model_digest(), worker_->clock().MonotonicNow() + options_.model_load_timeout);
    if (!host.ok()) {
      Refuse(connection->fd, host.status().message());
      return false;
    }
    v1::LocalWelcome::Pool* pool = welcome.add_pools();
    pool->set_model_digest((*host)->model().digest().ToHex());
    pool->set_size_bytes((*host)->pool().size_bytes());
    const int fd = Announce((*host)->pool().exported(), hello, pool);
    if (fd >= 0) fds.push_back(fd);
    CountPool(worker_->metrics(), *pool);
  }
  const uint64_t client_id = RandomId();
  welcome.set_client_id(client_id);
  welcome.set_staging_bytes((*staging)->num_bytes());
  {
    MutexLock lock(&mu_);
    clients_.emplace(client_id, Client{*staging, *std::move(memories)});
  }
  connection->client_id = client_id;
  return SendWelcome(connection->fd, welcome, fds);
}

void LocalPlane::DropClient(uint64_t client_id) {
  if (client_id == 0) return;
  std::vector<std::pair<uint64_t, Entry>> dropped;
  Client client;  // unmapped without the lock, if it is the last that holds its memories
  {
    MutexLock lock(&mu_);
    if (const auto at = clients_.find(client_id); at != clients_.end()) {
      client = std::move(at->second);
      clients_.erase(at);
    }
    for (auto it = reservations_.begin(); it != reservations_.end();) {
      if (it->second.client_id != client_id) {
        ++it;
        continue;
      }
      staging_bytes_ -= it->second.reservation.num_bytes;
      dropped.emplace_back(it->first, std::move(it->second));
      it = reservations_.erase(it);
    }
  }
  for (const auto& [reservation_id, entry] : dropped) {
    const Reservation& r = entry.reservation;
    const absl::Status aborted = r.host->Abort(r.tenant, r.sequence, reservation_id);
    if (!aborted.ok() && !absl::IsNotFound(aborted)) {
      LogWarning("worker", "abort reservation ", reservation_id,
                 " of a client that left: ", aborted.message());
    }
  }
  if (options_.on_client_gone) options_.on_client_gone(client_id);
}

void LocalPlane::DropExpired() {
  const MonotonicTime now = worker_->clock().MonotonicNow();
  MutexLock lock(&mu_);
  for (auto it = reservations_.begin(); it != reservations_.end();) {
    Entry& entry = it->second;
    if (entry.reservation.expires > now) {
      ++it;
      continue;
    }
    entry.buffer->Free(entry.offset);
    staging_bytes_ -= entry.reservation.num_bytes;
    it = reservations_.erase(it);
  }
}

absl::StatusOr<const LocalPlane::Client*> LocalPlane::FindClient(uint64_t client_id) const {
  const auto client = clients_.find(client_id);
  if (client != clients_.end()) return &client->second;
  return WithReason(absl::NotFoundError(absl::StrCat("local_client_id ", client_id,
                                                     " is not connected to this worker")),
                    "LOCAL_CLIENT_NOT_FOUND");
}

absl::Status LocalPlane::CheckClient(uint64_t client_id) const {
  MutexLock lock(&mu_);
  return FindClient(client_id).status();
}

absl::StatusOr<uint64_t> LocalPlane::Stage(uint64_t client_id, uint64_t reservation_id,
                                           Reservation reservation) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(const Client* client, FindClient(client_id));
  PT_ASSIGN_OR_RETURN(const uint64_t offset, client->staging->Allocate(reservation.num_bytes));
  staging_bytes_ += reservation.num_bytes;
  staging_high_water_bytes_ = std::max(staging_high_water_bytes_, staging_bytes_);
  reservations_.emplace(reservation_id,
                        Entry{std::move(reservation), client_id, client->staging, offset});
  return offset;
}

absl::StatusOr<LocalPlane::StagedRows> LocalPlane::FindStaged(SequenceId sequence,
                                                              uint64_t reservation_id) const {
  MutexLock lock(&mu_);
  const auto it = reservations_.find(reservation_id);
  if (it == reservations_.end() || it->second.reservation.sequence != sequence) {
    return absl::NotFoundError(
        absl::StrCat("reservation ", reservation_id, " has no rows in a staging buffer"));
  }
  const Entry& entry = it->second;
  return StagedRows{entry.buffer, entry.offset, entry.reservation.num_bytes,
                    entry.reservation.num_tokens};
}

void LocalPlane::Release(SequenceId sequence, uint64_t reservation_id) {
  MutexLock lock(&mu_);
  const auto it = reservations_.find(reservation_id);
  if (it == reservations_.end() || it->second.reservation.sequence != sequence) return;
  it->second.buffer->Free(it->second.offset);
  staging_bytes_ -= it->second.reservation.num_bytes;
  reservations_.erase(it);
}

absl::StatusOr<EngineLayout::Memories> LocalPlane::MemoriesOf(uint64_t client_id) const {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(const Client* client, FindClient(client_id));
  return client->memories;
}

size_t LocalPlane::num_clients() const {
  MutexLock lock(&mu_);
  return clients_.size();
}

uint64_t LocalPlane::staging_bytes() const {
  MutexLock lock(&mu_);
  return staging_bytes_;
}

uint64_t LocalPlane::staging_high_water_bytes() const {
  MutexLock lock(&mu_);
  return staging_high_water_bytes_;
}

}  // namespace pagetide
