// Frames that lie in a GPU, read in place by another process: pagetide-worker as it is, over a CUDA
// runtime and a driver that run on the CPU, and this process as the engine that imports its pool.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cpp/local_staging.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/local_plane.pb.h"
#include "rpc/channel.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"
#include "worker/cuda_shared_memory.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRows;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

// A client of the plane that keeps the descriptors it is sent.
class PlaneClient {
 public:
  PlaneClient(const std::string& path, const v1::LocalHello& hello) {
    socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof(address.sun_path) - 1);
    EXPECT_EQ(connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval patience{90, 0};
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    const uint32_t length = static_cast<uint32_t>(hello.ByteSizeLong());
    std::string frame(reinterpret_cast<const char*>(&length), sizeof(length));
    frame += hello.SerializeAsString();
    EXPECT_EQ(send(socket_, frame.data(), frame.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(frame.size()));
    char buffer[4096];
    alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))];
    iovec part{buffer, sizeof(buffer)};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t n = recvmsg(socket_, &message, MSG_CMSG_CLOEXEC);
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); n > 4 && c != nullptr;
         c = CMSG_NXTHDR(&message, c)) {
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      fds_.resize(count);
      std::memcpy(fds_.data(), CMSG_DATA(c), count * sizeof(int));
    }
    EXPECT_TRUE(n > 4 && welcome_.ParseFromArray(buffer + 4, static_cast<int>(n) - 4));
    EXPECT_EQ(welcome_.error(), "");
  }
  ~PlaneClient() {
    for (const int fd : fds_) close(fd);
    close(socket_);
  }
  PlaneClient(const PlaneClient&) = delete;
  PlaneClient& operator=(const PlaneClient&) = delete;

  const v1::LocalWelcome& welcome() const { return welcome_; }
  const v1::LocalWelcome::Pool& pool() const { return welcome_.pools(0); }
  const std::vector<int>& fds() const { return fds_; }

 private:
  int socket_ = -1;
  v1::LocalWelcome welcome_;
  std::vector<int> fds_;
};

class DevicePoolProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto store =
        ChildProcess::Start({.program = "pagetide-store",
                             .args = {"--data-dir", dir_ / "store", "--listen", "127.0.0.1:0"}});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    RemotePageStore remote(MakeChannel(store_->Address("grpc")));
    ASSERT_TRUE(RegisterTestModel(*model_, &remote).ok());
  }
  void StartWorker(std::vector<std::string> args,
                   std::vector<std::pair<std::string, std::string>> environment = {}) {
    environment.emplace_back("LD_LIBRARY_PATH", EMULATED_DRIVER_DIR);
    for (const std::string& arg :
         {std::string("--listen=127.0.0.1:0"), absl::StrCat("--store=", store_->Address("grpc")),
          absl::StrCat("--local-socket=", socket()), std::string("--device=cuda"),
          absl::StrCat("--pool-bytes=", 32 * model_->geometry().bytes_per_page_of_tokens())}) {
      args.push_back(arg);
    }
    auto worker = ChildProcess::Start({.program = "pagetide-worker-emulated-gpu",
                                       .args = std::move(args),
                                       .environment = std::move(environment)});
    ASSERT_TRUE(worker.ok()) << worker.status();
    worker_ = *std::move(worker);
    client_ = std::make_unique<WorkerClient>(worker_->Address("grpc"), model_);
  }
  std::string socket() const { return dir_ / "w.sock"; }
  v1::LocalHello Hello(const std::vector<v1::LocalMemory::Kind>& kinds) const {
    v1::LocalHello hello;
    hello.set_version(1);
    hello.set_model_digest(model_->digest().ToHex());
    for (const v1::LocalMemory::Kind kind : kinds) hello.add_pool_kinds(kind);
    return hello;
  }
  // A sequence of `tokens`, and where its pages lie, under a lease.
  v1::GetBlockTableResponse LeaseOf(const std::vector<uint32_t>& tokens, uint64_t client_id) {
    v1::GetBlockTableResponse table;
    const auto open = client_->Open({});
    EXPECT_TRUE(open.ok()) << open.status();
    if (!open.ok()) return table;
    const auto appended = client_->Append(open->state(), tokens, tokens.size());
    EXPECT_TRUE(appended.ok()) << appended.status();
    v1::GetBlockTableRequest request;
    request.set_sequence_id(open->state().sequence_id());
    request.mutable_lease()->set_seconds(30);
    request.set_local_client_id(client_id);
    TestContext context;
    const grpc::Status status = client_->sequences().GetBlockTable(&context, request, &table);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return table;
  }
  // Compares all rows of the table with those that were written; says how many bytes.
  uint64_t Compare(const v1::GetBlockTableResponse& table, const std::vector<uint32_t>& tokens,
                   const std::byte* pool, uint64_t pool_bytes) {
    const GroupGeometry& group = model_->geometry().group(0);
    uint64_t compared = 0;
    for (const auto& extent : table.extents()) {
      EXPECT_LE(extent.pool_offset() + group.page_bytes(), pool_bytes);
      for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
        for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
          const std::string want = TestRows(group, tokens, extent.first_row(),
                                            extent.first_row() + extent.count(), layer, kind);
          EXPECT_EQ(std::memcmp(pool + extent.pool_offset() +
                                    group.RowOffset(layer, kind, extent.first_slot()),
                                want.data(), want.size()),
                    0)
              << "layer " << layer << ", row " << extent.first_row();
          compared += want.size();
        }
      }
    }
    return compared;
  }
  static std::shared_ptr<const CudaVmmLibrary> Driver() {
    return CudaVmmLibrary::Load(absl::StrCat(EMULATED_DRIVER_DIR, "/libcuda.so.1")).value();
  }

  TempDir dir_;
  const std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  std::unique_ptr<ChildProcess> store_;
  std::unique_ptr<ChildProcess> worker_;
  std::unique_ptr<WorkerClient> client_;
};

TEST_F(DevicePoolProcessTest, AnEngineReadsFramesInTheGpuWhereTheyLie) {
  StartWorker({"--export-device-frames"});
  const PlaneClient plane(socket(), Hello({v1::LocalMemory::KIND_CUDA_VMM}));
  const v1::LocalWelcome::Pool& pool = plane.pool();
  ASSERT_EQ(pool.kind(), v1::LocalMemory::KIND_CUDA_VMM) << pool.why_not();
  EXPECT_TRUE(pool.has_device_fd());
  EXPECT_FALSE(pool.has_fd());
  EXPECT_EQ(pool.why_not(), "");
  EXPECT_GE(pool.mapped_bytes(), pool.size_bytes());
  ASSERT_EQ(plane.fds().size(), 2u);
  auto memory = ImportedMemory::FromFd(Driver(), 0, plane.fds()[1], pool.mapped_bytes(),
                                       ImportedMemory::Access::kRead);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ((*memory)->device_uuid(), pool.device_uuid());
  const auto tokens = TestTokens(1, 70);
  const v1::GetBlockTableResponse table = LeaseOf(tokens, plane.welcome().client_id());
  const GroupGeometry& group = model_->geometry().group(0);
  EXPECT_EQ(Compare(table, tokens, (*memory)->data(), pool.size_bytes()),
            70 * group.num_layers() * (group.k_row_bytes() + group.v_row_bytes()));
  EXPECT_TRUE(client_->EventuallyStat("pagetide_local_pools_total", 1));
  // What is mapped stays so when its owner is gone: a stale reader reads, and does not fault.
  worker_->Kill();
  Compare(table, tokens, (*memory)->data(), pool.size_bytes());
}

TEST_F(DevicePoolProcessTest, AGpuWithoutDescriptorsLendsItsFramesByAHandle) {
  StartWorker({"--export-device-frames"}, {{"EMULATED_CUDA_DESCRIPTORS", "0"}});
  const PlaneClient plane(socket(),
                          Hello({v1::LocalMemory::KIND_CUDA_VMM, v1::LocalMemory::KIND_CUDA_IPC}));
  const v1::LocalWelcome::Pool& pool = plane.pool();
  ASSERT_EQ(pool.kind(), v1::LocalMemory::KIND_CUDA_IPC) << pool.why_not();
  EXPECT_FALSE(pool.has_device_fd());
  EXPECT_EQ(plane.fds().size(), 1u);
  const auto memory =
      ImportedMemory::FromIpcHandle(Driver(), 0, pool.ipc_handle(), pool.mapped_bytes());
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto tokens = TestTokens(2, 40);
  const v1::GetBlockTableResponse table = LeaseOf(tokens, plane.welcome().client_id());
  EXPECT_GT(Compare(table, tokens, (*memory)->data(), pool.size_bytes()), 0u);
}

// Clients that do not say that they know a GPU's memory, those of before it existed among them.
TEST_F(DevicePoolProcessTest, WhoDoesNotUnderstandTheKindIsGivenNothingToMap) {
  StartWorker({"--export-device-frames"});
  for (const auto& kinds :
       {std::vector<v1::LocalMemory::Kind>{}, {v1::LocalMemory::KIND_CUDA_IPC}}) {
    const PlaneClient plane(socket(), Hello(kinds));
    EXPECT_EQ(plane.pool().kind(), v1::LocalMemory::KIND_CUDA_VMM);
    EXPECT_FALSE(plane.pool().has_fd());
    EXPECT_FALSE(plane.pool().has_device_fd());
    EXPECT_EQ(plane.pool().ipc_handle(), "");
    EXPECT_THAT(plane.pool().why_not(), HasSubstr("KIND_CUDA_VMM in pool_kinds"));
    EXPECT_EQ(plane.fds().size(), 1u) << "only the staging buffer's";
  }
  const auto staging =
      LocalStaging::Connect(socket(), 4096, absl::Seconds(60), model_->digest().ToHex());
  ASSERT_TRUE(staging.ok()) << staging.status();
  EXPECT_TRUE((*staging)->pool().empty());
  EXPECT_THAT((*staging)->why_no_pool(), HasSubstr("in a GPU"));
  auto example =
      ChildProcess::Start({.program = "pagetide-c-owned-pages",
                           .args = {worker_->Address("grpc"), socket(), model_->digest().ToHex(),
                                    "none", "2", "16", "64", "64"},
                           .wait_ready = false});
  ASSERT_TRUE(example.ok()) << example.status();
  EXPECT_EQ((*example)->Wait(absl::Seconds(90)).value_or(-1), 1);
  EXPECT_THAT((*example)->Log(),
              HasSubstr("frames cannot be mapped: kind 2: the frames lie in a GPU"));
}

TEST_F(DevicePoolProcessTest, WithoutTheOperatorsLeaveNothingIsExported) {
  StartWorker({});
  const PlaneClient plane(socket(),
                          Hello({v1::LocalMemory::KIND_CUDA_VMM, v1::LocalMemory::KIND_CUDA_IPC}));
  EXPECT_EQ(plane.pool().kind(), v1::LocalMemory::KIND_UNSPECIFIED);
  EXPECT_THAT(plane.pool().why_not(), HasSubstr("export_device_frames"));
  EXPECT_EQ(plane.fds().size(), 1u);
  // The worker serves rows all the same.
  const auto tokens = TestTokens(3, 40);
  const auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  ASSERT_TRUE(client_->Append(open->state(), tokens, tokens.size()).ok());
  EXPECT_TRUE(client_->Verify(open->state().sequence_id(), tokens, 0, 40).ok());
}

}  // namespace
}  // namespace pagetide
