#include "cli/sequence_map.h"

#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <sstream>

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST(SequenceMapTest, ShowsWhatIsWhereAndWhatIsStillToBeRotated) {
  v1::GetBlockTableResponse table;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"pb(state {
             sequence_id: "7-1"
             worker_id: "w1"
             length: 300
             canonical_length: 256
             end_position: 350
             revision: 4
             epoch: 1
             pending_tokens: 2
           }
           extents {
             count: 256
             page_id: 1
             page_state: "resident"
             frame: 3
             references: 2
             page_key: "\x12\x34\x56\x78\x9a\xbc\xde"
           }
           extents {
             first_row: 256
             first_position: 306
             first_slot: 50
             count: 44
             page_id: 2
             page_state: "stored"
             references: 1
             pending_shift: -450
           })pb",
      &table));
  std::ostringstream out;
  PrintSequenceMap(table, out);
  EXPECT_THAT(out.str(), HasSubstr("300 tokens (256 canonical), next position 350"));
  EXPECT_THAT(out.str(), HasSubstr("a write of 2 tokens is pending"));
  EXPECT_THAT(out.str(), HasSubstr("group 0  Kp\n"));
  EXPECT_THAT(out.str(), HasSubstr("306-349"));
  EXPECT_THAT(out.str(), HasSubstr("50-93"));
  EXPECT_THAT(out.str(), HasSubstr("-450"));
  EXPECT_THAT(out.str(), HasSubstr("123456789abc"));
}

}  // namespace
}  // namespace pagetide
