// FEATURES B13 as an operator has it: `pagetide sequences show ID` against a fleet.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "tests/conformance/assert_ok.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

TEST(SequenceMapTest, B13TheCommandPrintsWhatIsWhere) {
  const testing::TempDir dir;
  auto up =
      ChildProcess::Start({.program = "pagetide",
                           .args = {"up", absl::StrCat("--dir=", dir.path()), "--pool-bytes=1MiB",
                                    "--router-port=0", "--store-port=0", "--worker-port=0"}});
  ASSERT_OK(up);
  const std::string router = (*up)->Address("router");
  const auto model = std::make_shared<const Model>(testing::MakeTestModel({.num_layers = 1}));
  {
    v1::RegisterModelRequest request;
    *request.mutable_spec() = ToProto(model->spec());
    v1::RegisterModelResponse response;
    TestContext context;
    ASSERT_OK(FromGrpcStatus(v1::RouterService::NewStub(MakeChannel(router))
                                 ->RegisterModel(&context, request, &response)));
  }
  const auto show = [&](const std::string& id, std::string* log) {
    auto command = ChildProcess::Start({.program = "pagetide",
                                        .args = {"sequences", "show", "--router", router, id},
                                        .wait_ready = false});
    EXPECT_TRUE(command.ok()) << command.status();
    const int code = (*command)->Wait(absl::Seconds(120)).value_or(-1);
    *log = (*command)->Log();
    return code;
  };
  {
    WorkerClient client((*up)->Address("workers"), model);
    const std::vector<uint32_t> tokens = TestTokens(1, 40);
    auto open = client.Open({});
    ASSERT_OK(open);
    ASSERT_OK(client.Append(open->state(), tokens, 40));
    ASSERT_OK(client.Fork(open->state(), 32));
    v1::RemoveRangeRequest remove;
    remove.mutable_sequence()->set_sequence_id(open->state().sequence_id());
    remove.mutable_sequence()->set_epoch(open->state().epoch());
    remove.set_p0(20);
    remove.set_p1(24);
    v1::RemoveRangeResponse removed;
    TestContext context;
    ASSERT_OK(FromGrpcStatus(client.edits().RemoveRange(&context, remove, &removed)));
    // The router hears of the sequence with the worker's next report.
    std::string map;
    ASSERT_TRUE(Eventually([&] { return show(open->state().sequence_id(), &map) == 0; })) << map;
    EXPECT_THAT(map, HasSubstr(absl::StrCat("sequence ", open->state().sequence_id())));
    EXPECT_THAT(map, HasSubstr("36 tokens (20 canonical), next position 40"));
    // The second page is two extents; the tail is private.
    EXPECT_THAT(map, HasSubstr("group 0  KKKP"));
    EXPECT_THAT(map, HasSubstr("24-31"));
    EXPECT_THAT(map, HasSubstr("32-39"));
    EXPECT_EQ(show("0000000000000007-1", &map), 1) << map;
  }
  EXPECT_EQ((*up)->Terminate().value_or(-1), 0);
}

}  // namespace
}  // namespace pagetide
