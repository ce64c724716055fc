// Frames that lie in a GPU, read in place by another process: pagetide-worker as it is, over a CUDA
// runtime and a driver that run on the CPU, and this process as the engine that imports its pool.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "clients/cpp/local_staging.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/engine_pool.grpc.pb.h"
#include "pagetide/v1/local_plane.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"
#include "worker/cuda_shared_memory.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
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
  PlaneClient(const std::string& path, const v1::LocalHello& hello, int memory_fd = -1) {
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
    alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))] = {};
    iovec part{frame.data(), frame.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (memory_fd >= 0) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(sizeof(int));
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &memory_fd, sizeof(int));
    }
    EXPECT_EQ(sendmsg(socket_, &message, MSG_NOSIGNAL), static_cast<ssize_t>(frame.size()));
    char buffer[4096];
    part = {buffer, sizeof(buffer)};
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

// An engine's own pool in the GPU: blocks of 16 tokens, layer by layer, K and V, heads outside.
class GpuEngine {
 public:
  static constexpr uint32_t kBlocks = 8;
  GpuEngine(const Model& model, ExportableMemory* memory) : memory_(memory) {
    const GroupGeometry& group = model.geometry().group(0);
    request_.set_name("engine");
    request_.set_model_digest(model.digest().ToHex());
    request_.set_block_tokens(16);
    request_.set_num_blocks(kBlocks);
    v1::EngineGroup* const to = request_.add_groups();
    to->set_layout(v1::EngineGroup::LAYOUT_HND);
    to->set_k_type(v1::DATA_TYPE_F32);
    to->set_v_type(v1::DATA_TYPE_F32);
    to->set_kv_heads(group.spec().kv_heads);
    head_bytes_ = group.k_row_bytes() / group.spec().kv_heads;
    num_heads_ = group.spec().kv_heads;
    uint64_t at = 0;
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      v1::EngineGroup::Layer* const planes = to->add_layers();
      planes->mutable_k()->set_offset(at);
      planes->mutable_v()->set_offset(at + PlaneBytes());
      at += 2 * PlaneBytes();
    }
  }
  v1::LocalMemory Memory() const {
    v1::LocalMemory memory;
    const bool is_vmm = memory_->kind() == ExportableMemory::Kind::kVmm;
    memory.set_kind(is_vmm ? v1::LocalMemory::KIND_CUDA_VMM : v1::LocalMemory::KIND_CUDA_IPC);
    memory.set_size_bytes(memory_->size_bytes());
    memory.set_ipc_handle(memory_->ipc_handle());
    return memory;
  }
  v1::RegisterEnginePoolRequest Registration(uint64_t client_id) const {
    v1::RegisterEnginePoolRequest request = request_;
    request.set_local_client_id(client_id);
    return request;
  }
  // The row of slot `slot` in the plane of a layer and kind, to be read or written head by head.
  std::string Row(uint32_t layer, RowKind kind, uint32_t slot, const std::string* write = nullptr) {
    std::string row;
    for (uint64_t h = 0; h < num_heads_; ++h) {
      const uint64_t plane = (2 * layer + (kind == RowKind::kV ? 1 : 0)) * PlaneBytes();
      char* const at = reinterpret_cast<char*>(memory_->data()) + plane +
                       slot / 16 * (16 * num_heads_ * head_bytes_) + h * 16 * head_bytes_ +
                       slot % 16 * head_bytes_;
      if (write != nullptr) std::memcpy(at, write->data() + h * head_bytes_, head_bytes_);
      row.append(at, head_bytes_);
    }
    return row;
  }

 private:
  uint64_t PlaneBytes() const { return kBlocks * 16 * num_heads_ * head_bytes_; }

  ExportableMemory* const memory_;
  v1::RegisterEnginePoolRequest request_;
  uint64_t head_bytes_ = 0;
  uint64_t num_heads_ = 0;
};

class GpuEngineProcessTest : public DevicePoolProcessTest {
 protected:
  // Stores a prompt out of blocks 1…4 and loads it, with another's tokens, into other blocks.
  void RunEngine(const std::shared_ptr<ExportableMemory>& memory) {
    StartWorker({"--export-device-frames"});
    GpuEngine engine(*model_, memory.get());
    v1::LocalHello hello;
    hello.set_version(1);
    *hello.add_memories() = engine.Memory();
    auto plane = std::make_unique<PlaneClient>(socket(), hello, memory->fd());
    ASSERT_EQ(plane->welcome().error(), "");
    ASSERT_EQ(plane->welcome().num_memories(), 1u);
    const auto engines = v1::EnginePoolService::NewStub(client_->channel());
    TestContext registering;
    v1::RegisterEnginePoolResponse registered;
    absl::Status status = FromGrpcStatus(engines->RegisterEnginePool(
        &registering, engine.Registration(plane->welcome().client_id()), &registered));
    ASSERT_TRUE(status.ok()) << status;

    const auto tokens = TestTokens(5, 64);
    const GroupGeometry& group = model_->geometry().group(0);
    const auto rows_of = [&](uint32_t layer, RowKind kind, uint32_t i) {
      return TestRows(group, tokens, i, i + 1, layer, kind);
    };
    const std::vector<uint32_t> stored = {3, 1, 4, 2};
    for (uint32_t i = 0; i < 64; ++i) {
      for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
        for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
          const std::string row = rows_of(layer, kind, i);
          engine.Row(layer, kind, stored[i / 16] * 16 + i % 16, &row);
        }
      }
    }
    v1::StorePagesRequest store;
    *store.mutable_pool() = registered.pool();
    store.mutable_tokens()->Add(tokens.begin(), tokens.end());
    store.add_slot_maps()->mutable_blocks()->Add(stored.begin(), stored.end());
    v1::StorePagesResponse store_accepted;
    TestContext storing;
    status = FromGrpcStatus(engines->StorePages(&storing, store, &store_accepted));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(AwaitJob(*engines, store_accepted.job().job_id()), 64u);

    // Another client reads what the engine stored, row by row as they should be.
    const auto open = client_->Open(tokens);
    ASSERT_TRUE(open.ok()) << open.status();
    const uint64_t length = client_->WaitReady(open->state().sequence_id()).value_or(0);
    ASSERT_GE(length, 48u);
    EXPECT_TRUE(client_->Verify(open->state().sequence_id(), tokens, 0, length).ok());

    v1::LoadPagesRequest load;
    *load.mutable_pool() = registered.pool();
    load.mutable_tokens()->Add(tokens.begin(), tokens.end());
    load.set_allow_full_reuse(true);
    const std::vector<uint32_t> loaded = {7, 5, 6, 2};
    load.add_slot_maps()->mutable_blocks()->Add(loaded.begin(), loaded.end());
    v1::LoadPagesResponse load_accepted;
    TestContext loading;
    std::memset(memory->data(), 0xee, memory->size_bytes());
    status = FromGrpcStatus(engines->LoadPages(&loading, load, &load_accepted));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(AwaitJob(*engines, load_accepted.job().job_id()), 64u);
    const std::string untouched(group.k_row_bytes(), '\xee');
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        for (uint32_t i = 0; i < 64; ++i) {
          ASSERT_EQ(engine.Row(layer, kind, loaded[i / 16] * 16 + i % 16), rows_of(layer, kind, i))
              << "layer " << layer << ", token " << i;
        }
        for (const uint32_t block : {0u, 1u, 3u, 4u}) {
          for (uint32_t t = 0; t < 16; ++t) {
            ASSERT_EQ(engine.Row(layer, kind, block * 16 + t), untouched) << "block " << block;
          }
        }
      }
    }
    // The engine's end is its pool's.
    plane.reset();
    EXPECT_TRUE(Eventually([&] {
      TestContext context;
      return GetReason(FromGrpcStatus(engines->LoadPages(&context, load, &load_accepted))) ==
             "ENGINE_POOL_NOT_FOUND";
    }));
  }
  // The usable tokens of a job that ended well.
  static uint64_t AwaitJob(v1::EnginePoolService::StubInterface& engines, const std::string& id) {
    TestContext context;
    v1::WatchJobRequest watch;
    watch.set_job_id(id);
    v1::WatchJobResponse told;
    const auto stream = engines.WatchJob(&context, watch);
    while (stream->Read(&told)) {
    }
    EXPECT_TRUE(stream->Finish().ok());
    EXPECT_EQ(told.job().state(), v1::EngineJob::STATE_DONE) << told.DebugString();
    return told.job().usable_tokens();
  }
  static std::shared_ptr<ExportableMemory> MakeMemory() {
    return ExportableMemory::Create(Driver(), 0, 1 << 20).value();
  }
  std::string Refusal(const v1::LocalMemory& memory, int fd) {
    v1::LocalHello hello;
    hello.set_version(1);
    *hello.add_memories() = memory;
    return PlaneClient(socket(), hello, fd).welcome().error();
  }
};

TEST_F(GpuEngineProcessTest, ItsMemoryByADescriptorIsStoredFromAndLoadedInto) {
  RunEngine(MakeMemory());
}

TEST_F(GpuEngineProcessTest, ItsMemoryByAHandleIsStoredFromAndLoadedInto) {
  setenv("EMULATED_CUDA_DESCRIPTORS", "0", 1);
  const std::shared_ptr<ExportableMemory> memory = MakeMemory();
  unsetenv("EMULATED_CUDA_DESCRIPTORS");
  ASSERT_EQ(memory->kind(), ExportableMemory::Kind::kIpc);
  RunEngine(memory);
}

TEST_F(GpuEngineProcessTest, MemoryThatCannotBeImportedIsRefusedWithTheDriversWords) {
  StartWorker({"--export-device-frames"});
  const std::shared_ptr<ExportableMemory> memory = MakeMemory();
  const GpuEngine engine(*model_, memory.get());
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  EXPECT_THAT(Refusal(engine.Memory(), null), HasSubstr("CUDA_ERROR_INVALID_VALUE"));
  close(null);
  v1::LocalMemory odd = engine.Memory();
  odd.set_size_bytes(5000);
  EXPECT_THAT(Refusal(odd, memory->fd()), HasSubstr("no whole units"));
  EXPECT_THAT(Refusal(engine.Memory(), -1), HasSubstr("0 descriptors came"));
  v1::LocalMemory handle = engine.Memory();
  handle.set_kind(v1::LocalMemory::KIND_CUDA_IPC);
  EXPECT_THAT(Refusal(handle, memory->fd()), HasSubstr("1 descriptors came"));
  EXPECT_THAT(Refusal(handle, -1), HasSubstr("its handle has 0 bytes"));
  handle.set_ipc_handle(std::string(64, 'x'));
  EXPECT_THAT(Refusal(handle, -1), HasSubstr("CUDA_ERROR_INVALID_VALUE"));
  const std::shared_ptr<ExportableMemory> other =
      ExportableMemory::Create(Driver(), 1, 1 << 20).value();
  EXPECT_THAT(Refusal(GpuEngine(*model_, other.get()).Memory(), other->fd()),
              HasSubstr("not of this GPU"));
  EXPECT_EQ(Refusal(engine.Memory(), memory->fd()), "");
}

TEST_F(GpuEngineProcessTest, WithoutTheOperatorsLeaveItsMemoryIsNotTaken) {
  StartWorker({});
  const std::shared_ptr<ExportableMemory> memory = MakeMemory();
  EXPECT_THAT(Refusal(GpuEngine(*model_, memory.get()).Memory(), memory->fd()),
              HasSubstr("KIND_CUDA_VMM; this worker's device is cuda:0, it takes KIND_MEMFD only"));
}

TEST_F(GpuEngineProcessTest, BlocksOnTheHostAreNotReachedFromAGpu) {
  StartWorker({"--export-device-frames"});
  const std::shared_ptr<ExportableMemory> memory = MakeMemory();
  const GpuEngine engine(*model_, memory.get());
  const int fd = memfd_create("engine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(posix_fallocate(fd, 0, 1 << 20), 0);
  ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
  v1::LocalHello hello;
  hello.set_version(1);
  v1::LocalMemory* const on_host = hello.add_memories();
  on_host->set_kind(v1::LocalMemory::KIND_MEMFD);
  on_host->set_size_bytes(1 << 20);
  const PlaneClient plane(socket(), hello, fd);
  close(fd);
  ASSERT_EQ(plane.welcome().error(), "");
  TestContext context;
  v1::RegisterEnginePoolResponse registered;
  const absl::Status status = FromGrpcStatus(
      v1::EnginePoolService::NewStub(client_->channel())
          ->RegisterEnginePool(&context, engine.Registration(plane.welcome().client_id()),
                               &registered));
  EXPECT_EQ(GetReason(status), "POOL_NOT_ON_HOST") << status;
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
