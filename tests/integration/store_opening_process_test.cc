// pagetide-store over a folder that lost something that was durable: it does not start, says what
// is gone and what can be done, and starts when it is told to give that up.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "rpc/channel.h"
#include "tests/contract/test_page.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using testing::ChildProcess;
using ::testing::HasSubstr;

MonotonicTime Soon() {
  return Clock::Real()->MonotonicNow() + absl::Seconds(60);
}

class StoreOpeningProcessTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<ChildProcess>> Start(std::vector<std::string> flags = {}) {
    flags.insert(flags.end(), {"--listen=127.0.0.1:0", absl::StrCat("--data-dir=", data_)});
    return ChildProcess::Start({.program = "pagetide-store", .args = flags});
  }
  void ExpectRefused(const std::string& text) {
    const auto refused = Start();
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition) << "it serves";
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr(text));
  }
  // A page and a session over it, by a store that is stopped afterwards.
  void Save() {
    auto process = Start();
    ASSERT_TRUE(process.ok()) << process.status();
    RemotePageStore store(MakeChannel((*process)->Address("grpc"), {.own_connection = true}));
    const PutPage put = page_.put();
    ASSERT_TRUE(store.PutPages({&put, 1}, Durability::kLocal, Soon())[0].status.ok());
    ManifestRecord manifest;
    manifest.name = "session/tenant/kept";
    manifest.pages = {page_.ref()};
    const auto saved = store.PutManifest(manifest, 0, std::nullopt, Soon());
    ASSERT_TRUE(saved.ok() && saved->committed) << saved.status();
    ASSERT_EQ((*process)->Terminate().value_or(-1), 0);
  }
  bool HasSession(ChildProcess& process) {
    RemotePageStore store(MakeChannel(process.Address("grpc"), {.own_connection = true}));
    return store.GetManifest("session/tenant/kept", Soon()).ok();
  }
  static double LossesAccepted(ChildProcess& process, const std::string& kind) {
    grpc::ClientContext context;
    v1::GetStatsResponse stats;
    const auto admin = v1::AdminService::NewStub(MakeChannel(process.Address("grpc")));
    EXPECT_TRUE(admin->GetStats(&context, {}, &stats).ok());
    double value = 0;
    for (const auto& [name, v] : stats.values()) {
      if (name.find("pagetide_store_losses_accepted_total") == 0 &&
          name.find(kind) != std::string::npos) {
        value += v;
      }
    }
    return value;
  }

  testing::TempDir dir_;
  const std::string data_ = dir_ / "data";
  const TestPage page_ = MakeTestPage(1);
};

TEST_F(StoreOpeningProcessTest, ADamagedLogIsSaidBeforeAnythingIsGivenUp) {
  Save();
  for (const auto& entry : std::filesystem::directory_iterator(data_ + "/index")) {
    if (entry.path().extension() != ".log") continue;
    std::ifstream in(entry.path(), std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const size_t at = bytes.find("session/tenant/kept");
    if (at == std::string::npos) continue;
    bytes[at] = static_cast<char>(bytes[at] ^ 1);
    std::ofstream(entry.path(), std::ios::binary) << bytes;
  }
  ExpectRefused("was durable; nothing was changed");
  ExpectRefused("accept_loss \"log\"");
  auto process = Start({"--accept-loss=log"});
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_FALSE(HasSession(**process));
  EXPECT_EQ(LossesAccepted(**process, "log"), 1);
  ASSERT_EQ((*process)->Terminate().value_or(-1), 0);
  process = Start();
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_EQ(LossesAccepted(**process, "log"), 0);
}

TEST_F(StoreOpeningProcessTest, ADiskThatIsNotMountedCostsNoSession) {
  Save();
  const std::string segments = data_ + "/segments", away = dir_ / "away";
  std::filesystem::rename(segments, away);
  std::filesystem::create_directory(segments);
  ExpectRefused("these are not the segments of this index");
  std::filesystem::remove(segments);
  std::filesystem::rename(away, segments);
  auto process = Start();
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_TRUE(HasSession(**process));
  RemotePageStore store(MakeChannel((*process)->Address("grpc"), {.own_connection = true}));
  std::vector<std::byte> body(page_.body.size());
  const GetPage get{page_.meta.key, body, {}};
  EXPECT_EQ(store.GetPages({&get, 1}, Soon())[0].outcome, GetOutcome::kHit);
  EXPECT_EQ(body, page_.body);
  ASSERT_EQ((*process)->Terminate().value_or(-1), 0);
  std::filesystem::remove_all(segments);
  process = Start({"--accept-loss=segments"});
  ASSERT_TRUE(process.ok()) << process.status();
  EXPECT_EQ(LossesAccepted(**process, "segments"), 1);
  EXPECT_TRUE(HasSession(**process)) << "its page is a miss";
}

TEST_F(StoreOpeningProcessTest, NamesALossThatItDoesNotKnow) {
  const auto refused = Start({"--accept-loss=everything"});
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("accept_loss = \"everything\" is not"));
}

}  // namespace
}  // namespace pagetide
