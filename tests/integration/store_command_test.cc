// `pagetide store stats` as an operator runs it: against pagetide-store, through `pagetide up`, and
// where there is no store.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "rpc/channel.h"
#include "tests/contract/test_page.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using testing::ChildProcess;
using ::testing::HasSubstr;

struct Ended {
  int exit_code = -1;
  std::string log;
};

Ended RunStats(std::vector<std::string> flags) {
  flags.insert(flags.begin(), {"store", "stats"});
  auto command = ChildProcess::Start({.program = "pagetide", .args = flags, .wait_ready = false});
  EXPECT_TRUE(command.ok()) << command.status();
  const auto code = (*command)->Wait(absl::Seconds(120));
  return {code.value_or(-1), (*command)->Log()};
}

MonotonicTime Soon() {
  return Clock::Real()->MonotonicNow() + absl::Seconds(120);
}

// Three pages in, two of them read, one asked for that was never there.
void UseStore(const std::string& address) {
  RemotePageStore store(MakeChannel(address));
  std::vector<TestPage> pages = {MakeTestPage(1), MakeTestPage(2), MakeTestPage(3)};
  std::vector<PutPage> puts;
  for (const TestPage& page : pages) puts.push_back(page.put());
  for (const PutPageResult& result : store.PutPages(puts, Durability::kLocal, Soon())) {
    ASSERT_TRUE(result.status.ok()) << result.status;
  }
  for (int i : {1, 2, 99}) {
    const TestPage page = MakeTestPage(i);
    std::vector<std::byte> body(page.body.size());
    const std::vector<GetPage> gets = {{.key = page.meta.key, .body = body}};
    store.GetPages(gets, Soon());
  }
}

TEST(StoreCommandTest, PrintsWhatTheStoreDid) {
  const testing::TempDir dir;
  auto store = ChildProcess::Start({.program = "pagetide-store",
                                    .args = {"--listen=127.0.0.1:0", "--capacity=100MiB",
                                             absl::StrCat("--data-dir=", dir.path())}});
  ASSERT_TRUE(store.ok()) << store.status();
  const std::string address = (*store)->Address("grpc");
  UseStore(address);
  const Ended json = RunStats({"--json", "--store", address});
  ASSERT_EQ(json.exit_code, 0) << json.log;
  const auto stats = nlohmann::json::parse(json.log, nullptr, false);
  ASSERT_TRUE(stats.is_object()) << json.log;
  // protobuf's JSON writes 64-bit integers as strings.
  EXPECT_EQ(stats["pages"], "3");
  EXPECT_EQ(stats["pages_put"], "3");
  EXPECT_EQ(stats["pages_got"], "2");
  EXPECT_EQ(stats["pages_missed"], "1");
  EXPECT_EQ(stats["pages_quarantined"], "0");
  EXPECT_EQ(stats["capacity_bytes"], absl::StrCat(100 << 20));
  EXPECT_EQ(stats["state"], "serving");
  const Ended table = RunStats({"--store", address});
  EXPECT_EQ(table.exit_code, 0);
  EXPECT_THAT(table.log, HasSubstr(absl::StrCat("STORE            ", address)));
  EXPECT_THAT(table.log, HasSubstr("capacity         100 MiB"));
  EXPECT_THAT(table.log, HasSubstr("missed           1"));
}

TEST(StoreCommandTest, FindsTheStoreOfAFleetByItsRouter) {
  const testing::TempDir dir;
  auto up =
      ChildProcess::Start({.program = "pagetide",
                           .args = {"up", absl::StrCat("--dir=", dir.path()), "--pool-bytes=1MiB",
                                    "--router-port=0", "--store-port=0", "--worker-port=0"}});
  ASSERT_TRUE(up.ok()) << up.status();
  UseStore((*up)->Address("store"));
  const Ended table = RunStats({"--router", (*up)->Address("router")});
  EXPECT_EQ(table.exit_code, 0) << table.log;
  EXPECT_THAT(table.log, HasSubstr(absl::StrCat("STORE            ", (*up)->Address("store"))));
  EXPECT_THAT(table.log, HasSubstr("missed           1"));
  EXPECT_EQ((*up)->Terminate().value_or(-1), 0);
}

TEST(StoreCommandTest, SaysWhatIsNotThere) {
  const Ended none = RunStats({"--store", "127.0.0.1:1", "--timeout", "5"});
  EXPECT_EQ(none.exit_code, 1);
  EXPECT_THAT(none.log, HasSubstr("UNAVAILABLE"));
  auto router =
      ChildProcess::Start({.program = "pagetide-router", .args = {"--listen=127.0.0.1:0"}});
  ASSERT_TRUE(router.ok()) << router.status();
  const Ended no_store = RunStats({"--router", (*router)->Address("grpc")});
  EXPECT_EQ(no_store.exit_code, 1);
  EXPECT_THAT(no_store.log, HasSubstr("knows none among 0 members"));
  const Ended both = RunStats({"--router", "127.0.0.1:1", "--store", "127.0.0.1:2"});
  EXPECT_GT(both.exit_code, 1);
  const Ended what = RunStats({"--bytes"});
  EXPECT_GT(what.exit_code, 1);
  EXPECT_THAT(what.log, HasSubstr("--bytes"));
}

TEST(StoreCommandTest, TheStoreAnswersTheAdminService) {
  const testing::TempDir dir;
  auto store = ChildProcess::Start(
      {.program = "pagetide-store",
       .args = {"--listen=127.0.0.1:0", absl::StrCat("--data-dir=", dir.path())}});
  ASSERT_TRUE(store.ok()) << store.status();
  UseStore((*store)->Address("grpc"));
  const auto admin = v1::AdminService::NewStub(MakeChannel((*store)->Address("grpc")));
  {
    grpc::ClientContext context;
    v1::GetCapabilitiesResponse response;
    ASSERT_TRUE(admin->GetCapabilities(&context, {}, &response).ok());
    EXPECT_EQ(response.role(), "store");
  }
  {
    grpc::ClientContext context;
    v1::GetStatsResponse response;
    ASSERT_TRUE(admin->GetStats(&context, {}, &response).ok());
    EXPECT_FALSE(response.values().empty());
  }
  grpc::ClientContext context;
  v1::DumpFramesResponse frames;
  EXPECT_EQ(admin->DumpFrames(&context, {}, &frames).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ((*store)->Terminate().value_or(-1), 0);
}

}  // namespace
}  // namespace pagetide
