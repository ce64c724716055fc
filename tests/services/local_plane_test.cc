// The same-host data plane over a real unix socket: descriptors, seals, clients that die or
// misbehave.
#include "worker/local_plane.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "core/staging_layout.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/engine_pool.grpc.pb.h"
#include "pagetide/v1/local_plane.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/services/silent_file_system.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRows;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

// A client of the plane, as low as it goes.
class PlaneClient {
 public:
  explicit PlaneClient(const std::string& path) {
    fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
    timeval timeout{5, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  }
  ~PlaneClient() { Close(); }
  void Close() {
    for (int fd : fds_) close(fd);
    fds_.clear();
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  bool connected() const { return connected_; }
  void Send(const std::string& bytes) { send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL); }
  // The bytes, and with the first of them the descriptors.
  void SendWithFds(const std::string& bytes, const std::vector<int>& fds) {
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    iovec part{const_cast<char*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    sendmsg(fd_, &message, MSG_NOSIGNAL);
  }
  static std::string Frame(const std::string& body) {
    const uint32_t length = static_cast<uint32_t>(body.size());
    std::string frame(4, '\0');
    std::memcpy(frame.data(), &length, 4);  // tests run on little-endian machines only
    return frame + body;
  }
  // False when the worker closed the connection instead.
  bool Receive(v1::LocalWelcome* welcome) {
    char buffer[4096];
    alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))];
    iovec part{buffer, sizeof(buffer)};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t n = recvmsg(fd_, &message, MSG_CMSG_CLOEXEC);
    if (n <= 4) return false;
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
        fds_.push_back(fd);
      }
    }
    return welcome->ParseFromArray(buffer + 4, static_cast<int>(n) - 4);
  }
  bool Hello(const v1::LocalHello& hello, v1::LocalWelcome* welcome) {
    Send(Frame(hello.SerializeAsString()));
    return Receive(welcome);
  }
  // True once the worker has closed the connection.
  bool IsClosedByPeer() {
    char byte;
    return recv(fd_, &byte, 1, 0) <= 0;
  }
  int fd(size_t i) const { return fds_[i]; }
  size_t num_fds() const { return fds_.size(); }

 private:
  int fd_ = -1;
  bool connected_ = false;
  std::vector<int> fds_;
};

class LocalPlaneTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(RegisterTestModel(*model_, &store_).ok());
    WorkerRole::Options options;
    options.worker.pool_bytes = 16 * model_->geometry().bytes_per_page_of_tokens();
    options.local_plane.socket_path = dir_ / "plane.sock";
    options.local_plane.max_staging_bytes = 1 << 20;
    options.local_plane.max_clients = 2;
    options.server.drain_notice = drain_notice_;
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }
  std::string path() const { return dir_ / "plane.sock"; }
  v1::LocalHello Hello() const {
    v1::LocalHello hello;
    hello.set_version(1);
    hello.set_staging_bytes(64 << 10);
    hello.set_model_digest(model_->digest().ToHex());
    return hello;
  }
  v1::GetMemoryBreakdownResponse Memory() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(v1::AdminService::NewStub(client_->channel())
                    ->GetMemoryBreakdown(&context, {}, &response)
                    .ok());
    return response;
  }
  // A sequence with one reserved slot in the client's staging.
  v1::ReserveSlotsResponse Reserve(const v1::SequenceState& state, uint64_t client_id,
                                   uint32_t num_tokens) {
    TestContext context;
    v1::ReserveSlotsRequest request;
    auto* item = request.add_items();
    item->mutable_sequence()->set_sequence_id(state.sequence_id());
    item->mutable_sequence()->set_epoch(state.epoch());
    item->set_num_tokens(num_tokens);
    request.set_local_client_id(client_id);
    v1::ReserveSlotsResponse response;
    status_ = FromGrpcStatus(client_->sequences().ReserveSlots(&context, request, &response));
    return response;
  }

  testing::TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  absl::Duration drain_notice_ = absl::ZeroDuration();
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
  absl::Status status_;
};

TEST_F(LocalPlaneTest, RowsWrittenIntoStagingAreCommittedAndReadInPlace) {
  PlaneClient plane(path());
  ASSERT_TRUE(plane.connected());
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Hello(Hello(), &welcome));
  ASSERT_EQ(welcome.error(), "");
  ASSERT_EQ(plane.num_fds(), 2);
  ASSERT_GE(welcome.staging_bytes(), 64 << 10);
  auto* staging = static_cast<char*>(
      mmap(nullptr, welcome.staging_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, plane.fd(0), 0));
  ASSERT_NE(staging, MAP_FAILED);

  const auto tokens = TestTokens(1, 20);
  auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  const v1::ReserveSlotsResponse slots =
      Reserve(open->state(), welcome.client_id(), static_cast<uint32_t>(tokens.size()));
  ASSERT_TRUE(status_.ok()) << status_;
  const PageGeometry& geometry = model_->geometry();
  ASSERT_EQ(slots.slots(0).staging_bytes(), StagedBytes(geometry, 20));
  for (uint32_t layer = 0; layer < 2; ++layer) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      const std::string rows = TestRows(geometry.group(0), tokens, 0, 20, layer, kind);
      std::memcpy(
          staging + slots.slots(0).staging_offset() + StagedOffset(geometry, 20, 0, layer, kind),
          rows.data(), rows.size());
    }
  }
  EXPECT_EQ(Memory().staging_bytes(), StagedBytes(geometry, 20));
  TestContext context;
  v1::CommitStepRequest step;
  auto* item = step.add_items();
  item->mutable_sequence()->set_sequence_id(open->state().sequence_id());
  item->mutable_sequence()->set_epoch(open->state().epoch());
  item->set_reservation_id(slots.slots(0).reservation_id());
  item->mutable_tokens()->Add(tokens.begin(), tokens.begin() + 18);  // fewer than reserved
  item->set_rows_in_staging(true);
  v1::CommitStepResponse committed;
  ASSERT_TRUE(client_->sequences().CommitStep(&context, step, &committed).ok());
  ASSERT_EQ(committed.results(0).code(), 0) << committed.results(0).message();
  EXPECT_EQ(committed.results(0).length(), 18);
  EXPECT_EQ(Memory().staging_bytes(), 0);
  EXPECT_GE(Memory().staging_high_water_bytes(), StagedBytes(geometry, 20));
  ASSERT_TRUE(client_->Verify(open->state().sequence_id(), tokens, 0, 18).ok());

  // In place, under a lease: the first K rows of the frame are what was staged.
  v1::GetBlockTableRequest table_request;
  table_request.set_sequence_id(open->state().sequence_id());
  table_request.mutable_lease()->set_seconds(5);
  v1::GetBlockTableResponse table;
  TestContext table_context;
  ASSERT_TRUE(client_->sequences().GetBlockTable(&table_context, table_request, &table).ok());
  const void* pool =
      mmap(nullptr, welcome.pools(0).size_bytes(), PROT_READ, MAP_SHARED, plane.fd(1), 0);
  ASSERT_NE(pool, MAP_FAILED);
  const std::string expected = TestRows(geometry.group(0), tokens, 0, 16, 0, RowKind::kK);
  EXPECT_EQ(std::memcmp(static_cast<const char*>(pool) + table.extents(0).pool_offset(),
                        expected.data(), expected.size()),
            0);
  munmap(const_cast<void*>(pool), welcome.pools(0).size_bytes());
  munmap(staging, welcome.staging_bytes());
}

// A reservation's region goes to the next one when it is given back: only its own sequence may.
TEST_F(LocalPlaneTest, NobodyFreesTheStagingOfAnothersReservation) {
  PlaneClient plane(path());
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Hello(Hello(), &welcome));
  auto mine = client_->Open({});
  auto other = client_->Open({});
  ASSERT_TRUE(mine.ok() && other.ok());
  const v1::ReserveSlotsResponse slots = Reserve(mine->state(), welcome.client_id(), 20);
  ASSERT_TRUE(status_.ok()) << status_;
  const uint64_t staged = Memory().staging_bytes();
  ASSERT_GT(staged, 0u);
  const auto abort = [&](const v1::SequenceState& state) {
    TestContext context;
    v1::AbortReservationRequest request;
    request.set_sequence_id(state.sequence_id());
    request.set_epoch(state.epoch());
    request.set_reservation_id(slots.slots(0).reservation_id());
    v1::AbortReservationResponse response;
    return FromGrpcStatus(client_->sequences().AbortReservation(&context, request, &response));
  };
  ASSERT_TRUE(abort(other->state()).ok()) << "a reservation that is not there is given back";
  EXPECT_EQ(Memory().staging_bytes(), staged);
  EXPECT_EQ(client_->Get(mine->state().sequence_id())->pending_tokens(), 20);
  ASSERT_TRUE(abort(mine->state()).ok());
  EXPECT_EQ(Memory().staging_bytes(), 0u);
  EXPECT_EQ(client_->Get(mine->state().sequence_id())->pending_tokens(), 0);
}

TEST_F(LocalPlaneTest, AnEnginesMemoryInAGpuIsRefusedByKind) {
  for (const auto kind : {v1::LocalMemory::KIND_CUDA_VMM, v1::LocalMemory::KIND_CUDA_IPC,
                          v1::LocalMemory::KIND_UNSPECIFIED}) {
    PlaneClient plane(path());
    v1::LocalHello hello = Hello();
    v1::LocalMemory* const memory = hello.add_memories();
    memory->set_kind(kind);
    memory->set_size_bytes(2 << 20);
    memory->set_ipc_handle(std::string(64, 'x'));
    v1::LocalWelcome welcome;
    ASSERT_TRUE(plane.Hello(hello, &welcome));
    EXPECT_THAT(welcome.error(), ::testing::HasSubstr(v1::LocalMemory::Kind_Name(kind)));
    EXPECT_TRUE(plane.IsClosedByPeer());
  }
}

// Whatever else the client could map.
TEST_F(LocalPlaneTest, FramesInHostMemoryAreSaidToBe) {
  v1::LocalHello hello = Hello();
  for (const int kind : {0, 2, 3, 99}) {
    hello.add_pool_kinds(static_cast<v1::LocalMemory::Kind>(kind));
    PlaneClient plane(path());
    v1::LocalWelcome welcome;
    ASSERT_TRUE(plane.Hello(hello, &welcome));
    EXPECT_EQ(welcome.pools(0).kind(), v1::LocalMemory::KIND_MEMFD);
    EXPECT_TRUE(welcome.pools(0).has_fd());
    EXPECT_FALSE(welcome.pools(0).has_device_fd());
    EXPECT_EQ(welcome.pools(0).why_not(), "");
    EXPECT_EQ(plane.num_fds(), 2u);
  }
}

TEST_F(LocalPlaneTest, DescriptorsAreSealed) {
  PlaneClient plane(path());
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Hello(Hello(), &welcome));
  // The pool can be mapped for reading only, the staging cannot change its size.
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, plane.fd(1), 0), MAP_FAILED);
  EXPECT_LT(pwrite(plane.fd(1), "x", 1, 0), 0);
  EXPECT_NE(ftruncate(plane.fd(0), 0), 0);
  EXPECT_NE(ftruncate(plane.fd(0), 1 << 30), 0);
}

TEST_F(LocalPlaneTest, GarbageClosesTheConnectionAndNothingElse) {
  const std::string good = PlaneClient::Frame(Hello().SerializeAsString());
  v1::LocalHello wrong_version = Hello();
  wrong_version.set_version(9);
  for (const std::string& bytes :
       {std::string("\xff\xff\xff\xff", 4), std::string("\x00\x10\x01\x00more", 8),
        PlaneClient::Frame("\xff\xff\xff garbage"), good + "more",
        PlaneClient::Frame(wrong_version.SerializeAsString())}) {
    PlaneClient plane(path());
    plane.Send(bytes);
    v1::LocalWelcome welcome;
    if (plane.Receive(&welcome)) {
      EXPECT_NE(welcome.error(), "");
    }
    EXPECT_TRUE(plane.IsClosedByPeer());
  }
  PlaneClient after(path());
  v1::LocalWelcome welcome;
  ASSERT_TRUE(after.Hello(Hello(), &welcome));
  EXPECT_EQ(welcome.error(), "");
  // Bytes after the welcome end the connection too.
  after.Send("x");
  EXPECT_TRUE(after.IsClosedByPeer());
}

TEST_F(LocalPlaneTest, AHelloInPiecesIsUnderstood) {
  PlaneClient plane(path());
  const std::string bytes = PlaneClient::Frame(Hello().SerializeAsString());
  for (char byte : bytes) plane.Send(std::string(1, byte));
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Receive(&welcome));
  EXPECT_EQ(welcome.error(), "");
}

TEST_F(LocalPlaneTest, AnUnknownModelIsRefusedWithItsReason) {
  PlaneClient plane(path());
  v1::LocalHello hello = Hello();
  hello.set_model_digest(std::string(64, 'a'));
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Hello(hello, &welcome));
  EXPECT_NE(welcome.error(), "");
  EXPECT_EQ(plane.num_fds(), 0);
}

TEST_F(LocalPlaneTest, ClientsAreBounded) {
  PlaneClient a(path()), b(path());
  v1::LocalWelcome welcome;
  ASSERT_TRUE(a.Hello(Hello(), &welcome));
  ASSERT_TRUE(b.Hello(Hello(), &welcome));
  PlaneClient c(path());
  ASSERT_TRUE(c.Receive(&welcome));
  EXPECT_NE(welcome.error(), "");
  a.Close();
  EXPECT_TRUE(Eventually([&] {
    PlaneClient next(path());
    v1::LocalWelcome answer;
    return next.Hello(Hello(), &answer) && answer.error().empty();
  }));
}

TEST_F(LocalPlaneTest, TheDeathOfAClientFreesStagingAndAbortsItsReservations) {
  auto open = client_->Open({});
  ASSERT_TRUE(open.ok());
  uint64_t client_id = 0;
  {
    PlaneClient plane(path());
    v1::LocalWelcome welcome;
    ASSERT_TRUE(plane.Hello(Hello(), &welcome));
    client_id = welcome.client_id();
    Reserve(open->state(), client_id, 20);
    ASSERT_TRUE(status_.ok()) << status_;
    EXPECT_EQ(client_->Get(open->state().sequence_id())->pending_tokens(), 20);
    EXPECT_GT(Memory().staging_bytes(), 0);
  }
  EXPECT_TRUE(Eventually([&] { return Memory().staging_bytes() == 0; }));
  EXPECT_TRUE(
      Eventually([&] { return client_->Get(open->state().sequence_id())->pending_tokens() == 0; }));
  Reserve(open->state(), client_id, 1);
  EXPECT_EQ(status_.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->Get(open->state().sequence_id())->pending_tokens(), 0);
}

// An engine's memory for `num_blocks` blocks of 16 tokens, laid out layer by layer, dense.
class PlaneEngine {
 public:
  PlaneEngine(const PageGeometry& geometry, uint32_t num_blocks, bool is_sparse = false) {
    const GroupGeometry& group = geometry.group(0);
    request_.set_name("engine");
    request_.set_block_tokens(16);
    request_.set_num_blocks(num_blocks);
    v1::EngineGroup* to = request_.add_groups();
    to->set_layout(v1::EngineGroup::LAYOUT_NHD);
    to->set_k_type(v1::DATA_TYPE_F32);
    to->set_v_type(v1::DATA_TYPE_F32);
    to->set_kv_heads(group.spec().kv_heads);
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      v1::EngineGroup::Layer* planes = to->add_layers();
      planes->mutable_k()->set_offset(num_bytes_);
      num_bytes_ += uint64_t{num_blocks} * 16 * group.k_row_bytes();
      planes->mutable_v()->set_offset(num_bytes_);
      num_bytes_ += uint64_t{num_blocks} * 16 * group.v_row_bytes();
    }
    fd_ = memfd_create("engine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    EXPECT_EQ(ftruncate(fd_, static_cast<off_t>(num_bytes_)), 0);
    if (!is_sparse) Allocate();
    EXPECT_EQ(fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK), 0);
  }
  void Allocate() { EXPECT_EQ(posix_fallocate(fd_, 0, static_cast<off_t>(num_bytes_)), 0); }
  uint64_t num_bytes() const { return num_bytes_; }
  ~PlaneEngine() { close(fd_); }
  PlaneEngine(const PlaneEngine&) = delete;
  PlaneEngine& operator=(const PlaneEngine&) = delete;

  int fd() const { return fd_; }
  v1::LocalHello Hello() const {
    v1::LocalHello hello;
    hello.set_version(1);
    v1::LocalMemory* memory = hello.add_memories();
    memory->set_kind(v1::LocalMemory::KIND_MEMFD);
    memory->set_size_bytes(num_bytes_);
    return hello;
  }
  v1::RegisterEnginePoolRequest Registration(const Model& model, uint64_t client_id) const {
    v1::RegisterEnginePoolRequest request = request_;
    request.set_model_digest(model.digest().ToHex());
    request.set_local_client_id(client_id);
    return request;
  }
  // Rows of tokens [0, n) in blocks 1, 2, … of one layer.
  std::string Read(uint32_t layer, uint64_t row_bytes, uint64_t num_tokens) const {
    std::string rows(num_tokens * row_bytes, '\0');
    const uint64_t at = request_.groups(0).layers(layer).k().offset() + 16 * row_bytes;
    EXPECT_EQ(pread(fd_, rows.data(), rows.size(), static_cast<off_t>(at)),
              static_cast<ssize_t>(rows.size()));
    return rows;
  }

 private:
  v1::RegisterEnginePoolRequest request_;
  uint64_t num_bytes_ = 0;
  int fd_ = -1;
};

TEST_F(LocalPlaneTest, AnEnginesMemoryIsLoadedIntoAndItsPoolEndsWithItsConnection) {
  const auto engines = v1::EnginePoolService::NewStub(client_->channel());
  const auto tokens = TestTokens(3, 32);
  auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  ASSERT_TRUE(client_->Append(open->state(), tokens, tokens.size()).ok());

  const PlaneEngine engine(model_->geometry(), 4);
  auto plane = std::make_unique<PlaneClient>(path());
  plane->SendWithFds(PlaneClient::Frame(engine.Hello().SerializeAsString()), {engine.fd()});
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane->Receive(&welcome));
  ASSERT_EQ(welcome.error(), "");
  EXPECT_EQ(welcome.num_memories(), 1);
  v1::RegisterEnginePoolRequest registration = engine.Registration(*model_, welcome.client_id());
  registration.set_request_id("once");
  v1::RegisterEnginePoolResponse registered, repeated;
  TestContext first, second, third, fourth, fifth;
  absl::Status status =
      FromGrpcStatus(engines->RegisterEnginePool(&first, registration, &registered));
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_TRUE(engines->RegisterEnginePool(&second, registration, &repeated).ok());
  EXPECT_EQ(repeated.pool().generation(), registered.pool().generation());

  v1::LoadPagesRequest load;
  *load.mutable_pool() = registered.pool();
  load.mutable_tokens()->Add(tokens.begin(), tokens.end());
  load.set_allow_full_reuse(true);
  v1::SlotMap* map = load.add_slot_maps();
  map->add_blocks(1);
  map->add_blocks(2);
  v1::LoadPagesResponse accepted;
  status = FromGrpcStatus(engines->LoadPages(&third, load, &accepted));
  ASSERT_TRUE(status.ok()) << status;
  v1::WatchJobRequest watch;
  watch.set_job_id(accepted.job().job_id());
  v1::WatchJobResponse told;
  const auto stream = engines->WatchJob(&fourth, watch);
  while (stream->Read(&told)) {
  }
  ASSERT_TRUE(stream->Finish().ok());
  EXPECT_EQ(told.job().state(), v1::EngineJob::STATE_DONE) << told.DebugString();
  EXPECT_EQ(told.job().usable_tokens(), 32);
  const GroupGeometry& group = model_->geometry().group(0);
  EXPECT_EQ(engine.Read(1, group.k_row_bytes(), 32),
            TestRows(group, tokens, 0, 32, 1, RowKind::kK));

  plane.reset();
  EXPECT_TRUE(Eventually([&] {
    TestContext context;
    v1::LoadPagesResponse refused;
    return GetReason(FromGrpcStatus(engines->LoadPages(&context, load, &refused))) ==
           "ENGINE_POOL_NOT_FOUND";
  }));
  registration.set_request_id("");
  status = FromGrpcStatus(engines->RegisterEnginePool(&fifth, registration, &registered));
  EXPECT_EQ(GetReason(status), "LOCAL_CLIENT_NOT_FOUND") << status;
}

TEST_F(LocalPlaneTest, AnEnginesMemoryWithHolesIsRefusedWithNumbersUntilItIsAllocated) {
  const auto engines = v1::EnginePoolService::NewStub(client_->channel());
  PlaneEngine engine(model_->geometry(), 4, /*is_sparse=*/true);
  ASSERT_EQ(pwrite(engine.fd(), "x", 1, 0), 1);  // the first page is there
  PlaneClient plane(path());
  plane.SendWithFds(PlaneClient::Frame(engine.Hello().SerializeAsString()), {engine.fd()});
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Receive(&welcome));
  ASSERT_EQ(welcome.error(), "");
  const auto registered = [&] {
    TestContext context;
    v1::RegisterEnginePoolResponse response;
    return FromGrpcStatus(engines->RegisterEnginePool(
        &context, engine.Registration(*model_, welcome.client_id()), &response));
  };
  const absl::Status refused = registered();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << refused;
  EXPECT_THAT(std::string(refused.message()),
              ::testing::AllOf(::testing::HasSubstr("memory 0"), ::testing::HasSubstr("byte 4096"),
                               ::testing::HasSubstr(
                                   absl::StrCat("4096 of its ", engine.num_bytes(), " bytes"))));
  EXPECT_EQ(lseek(engine.fd(), 0, SEEK_CUR), 0);  // where the engine left it
  engine.Allocate();
  const absl::Status taken = registered();
  EXPECT_TRUE(taken.ok()) << taken;
}

// Calls still come in for a while when it begins to drain.
class DrainingPlaneTest : public LocalPlaneTest {
 protected:
  DrainingPlaneTest() { drain_notice_ = absl::Seconds(2); }
};

TEST_F(DrainingPlaneTest, ADrainingWorkerTakesNoMoreJobsAndSaysSo) {
  const auto engines = v1::EnginePoolService::NewStub(client_->channel());
  const PlaneEngine engine(model_->geometry(), 4);
  PlaneClient plane(path());
  plane.SendWithFds(PlaneClient::Frame(engine.Hello().SerializeAsString()), {engine.fd()});
  v1::LocalWelcome welcome;
  ASSERT_TRUE(plane.Receive(&welcome));
  v1::RegisterEnginePoolResponse registered;
  TestContext first;
  const absl::Status status = FromGrpcStatus(engines->RegisterEnginePool(
      &first, engine.Registration(*model_, welcome.client_id()), &registered));
  ASSERT_TRUE(status.ok()) << status;
  std::thread drain([&] { role_->Drain(absl::Seconds(30)); });
  absl::Status refused;
  EXPECT_TRUE(Eventually([&] {
    TestContext context;
    v1::StorePagesRequest request;
    *request.mutable_pool() = registered.pool();
    request.add_tokens(1);
    request.add_slot_maps()->add_blocks(1);
    v1::StorePagesResponse response;
    refused = FromGrpcStatus(engines->StorePages(&context, request, &response));
    return !refused.ok();
  }));
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_EQ(GetReason(refused), "DRAINING");
  TestContext second;
  EXPECT_EQ(GetReason(FromGrpcStatus(engines->RegisterEnginePool(
                &second, engine.Registration(*model_, welcome.client_id()), &registered))),
            "DRAINING");
  drain.join();
}

TEST_F(LocalPlaneTest, DescriptorsThatNobodyAskedForEndTheConnection) {
  const PlaneEngine engine(model_->geometry(), 4);
  {
    PlaneClient plane(path());
    plane.SendWithFds(PlaneClient::Frame(Hello().SerializeAsString()), {engine.fd()});
    v1::LocalWelcome welcome;
    ASSERT_TRUE(plane.Receive(&welcome));
    EXPECT_NE(welcome.error(), "");
    EXPECT_TRUE(plane.IsClosedByPeer());
  }
  {
    PlaneClient plane(path());
    plane.SendWithFds("x", std::vector<int>(40, engine.fd()));
    EXPECT_TRUE(plane.IsClosedByPeer());
  }
  PlaneClient after(path());
  v1::LocalWelcome welcome;
  ASSERT_TRUE(after.Hello(Hello(), &welcome));
  after.SendWithFds("x", {engine.fd()});
  EXPECT_TRUE(after.IsClosedByPeer());
}

TEST_F(LocalPlaneTest, AFileWhoseFileSystemNeverAnswersHoldsNobodyUp) {
  const testing::SilentFileSystem silent;
  if (!silent.why_not().empty()) GTEST_SKIP() << silent.why_not();
  v1::LocalHello hello;
  hello.set_version(1);
  v1::LocalMemory* const memory = hello.add_memories();
  memory->set_kind(v1::LocalMemory::KIND_MEMFD);
  memory->set_size_bytes(8192);
  // More than there are threads that may be stuck with the file.
  for (int i = 0; i < 6; ++i) {
    PlaneClient hostile(path());
    hostile.SendWithFds(PlaneClient::Frame(hello.SerializeAsString()), {silent.file()});
    v1::LocalWelcome welcome;
    ASSERT_TRUE(hostile.Receive(&welcome)) << "the plane waits for the file system";
    EXPECT_THAT(welcome.error(), ::testing::HasSubstr("no memfd"));
    EXPECT_TRUE(hostile.IsClosedByPeer());
    PlaneClient hasty(path());
    hasty.SendWithFds("garbage that is no hello", {silent.file(), silent.file()});
    EXPECT_TRUE(hasty.IsClosedByPeer());
    PlaneClient good(path());
    ASSERT_TRUE(good.Hello(Hello(), &welcome)) << "the plane waits for the file system";
    EXPECT_EQ(welcome.error(), "");
  }
  // The threads that close do wait: this is what the plane would have done.
  EXPECT_TRUE(Eventually([&] { return silent.num_unanswered() > 0; }));
}

TEST_F(LocalPlaneTest, StagingThatIsFullRefusesTheReservationWhole) {
  PlaneClient plane(path());
  v1::LocalWelcome welcome;
  v1::LocalHello hello = Hello();
  hello.set_staging_bytes(4096);  // 16 tokens of 256 bytes
  ASSERT_TRUE(plane.Hello(hello, &welcome));
  auto open = client_->Open({});
  ASSERT_TRUE(open.ok());
  Reserve(open->state(), welcome.client_id(), 17);
  EXPECT_EQ(status_.code(), absl::StatusCode::kResourceExhausted) << status_;
  EXPECT_EQ(client_->Get(open->state().sequence_id())->pending_tokens(), 0);
  Reserve(open->state(), welcome.client_id(), 16);
  EXPECT_TRUE(status_.ok()) << status_;
}

}  // namespace
}  // namespace pagetide
