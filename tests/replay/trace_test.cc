#include "replay/trace.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Writes `lines` to a file of its own and reads all its requests.
class TraceTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::vector<TraceRequest>> Read(TraceFormat format, const std::string& lines,
                                                 const TraceOptions& options = {}) {
    const std::string path =
        absl::StrCat(::testing::TempDir(), "/trace_", getpid(), "_",
                     ::testing::UnitTest::GetInstance()->current_test_info()->name(), ".jsonl");
    std::ofstream(path, std::ios::binary) << lines;
    auto source = OpenTrace(path, format, options);
    if (!source.ok()) return source.status();
    std::vector<TraceRequest> requests;
    while (true) {
      auto request = (*source)->Next();
      if (!request.ok()) return request.status();
      if (!request->has_value()) break;
      requests.push_back(**std::move(request));
    }
    num_pages_ = (*source)->num_pages();
    return requests;
  }

  std::string Error(TraceFormat format, const std::string& lines) {
    const absl::Status status = Read(format, lines).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  }

  size_t num_pages_ = 0;
};

constexpr char kGoodMooncake[] =
    R"({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]})";

TEST_F(TraceTest, MooncakePagesAreDenseAndSharedByPrefix) {
  auto requests = Read(TraceFormat::kMooncake, absl::StrCat(kGoodMooncake, "\n\n", R"(
{"timestamp": 250, "input_length": 1024, "output_length": 1, "hash_ids": [7, 99]}
)"));
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 2u);
  EXPECT_THAT((*requests)[0].pages, ElementsAre(PageId(0), PageId(1)));
  EXPECT_THAT((*requests)[1].pages, ElementsAre(PageId(0), PageId(2)));
  EXPECT_EQ((*requests)[1].arrival, absl::Milliseconds(250));
  EXPECT_EQ((*requests)[1].input_tokens, 1024);
  EXPECT_EQ((*requests)[0].output_tokens, 5);
  EXPECT_EQ(num_pages_, 3u);
}

TEST_F(TraceTest, MooncakeRequestsComeByArrival) {
  auto requests = Read(TraceFormat::kMooncake,
                       R"({"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": []}
{"timestamp": 3, "input_length": 2, "output_length": 1, "hash_ids": []})");
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_EQ((*requests)[0].input_tokens, 2);
  EXPECT_EQ((*requests)[0].line, 2u);
}

// A hostile file may use an id behind two different prefixes: these are two pages, so pages stay a
// forest.
TEST_F(TraceTest, SameIdBehindAnotherPrefixIsAnotherPage) {
  auto requests =
      Read(TraceFormat::kMooncake,
           R"({"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
{"timestamp": 1, "input_length": 1024, "output_length": 1, "hash_ids": [2, 1]}
{"timestamp": 2, "input_length": 1024, "output_length": 1, "hash_ids": [1, 1]})");
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_THAT((*requests)[0].pages, ElementsAre(PageId(0), PageId(1)));
  EXPECT_THAT((*requests)[1].pages, ElementsAre(PageId(2), PageId(3)));
  EXPECT_THAT((*requests)[2].pages, ElementsAre(PageId(0), PageId(4)));
}

TEST_F(TraceTest, BadMooncakeLinesNameLineAndField) {
  const auto error = [this](const std::string& line) {
    return Error(TraceFormat::kMooncake, absl::StrCat(kGoodMooncake, "\n", line));
  };
  EXPECT_THAT(error("{\"timestamp\": 0, "),
              HasSubstr(".jsonl:2: a line of 17 bytes is not a JSON"));
  EXPECT_THAT(error("[1, 2]"), HasSubstr(":2: a line of 6 bytes is not a JSON object"));
  EXPECT_THAT(error(std::string(100000, '[')), HasSubstr(":2: a line of 100000 bytes"));
  EXPECT_THAT(error(R"({"input_length": 1, "output_length": 1, "hash_ids": []})"),
              HasSubstr(":2: field timestamp: missing"));
  EXPECT_THAT(error(R"({"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": []})"),
              HasSubstr(":2: field timestamp: not a number in [0, "));
  EXPECT_THAT(
      error(R"({"timestamp": 0, "input_length": -512, "output_length": 1, "hash_ids": []})"),
      HasSubstr(":2: field input_length: not an integer in [1, 16777216]"));
  EXPECT_THAT(
      error(
          R"({"timestamp": 0, "input_length": 99999999999999999999, "output_length": 1, "hash_ids": []})"),
      HasSubstr(":2: field input_length: not an integer"));
  EXPECT_THAT(
      error(R"({"timestamp": 0, "input_length": 10.5, "output_length": 1, "hash_ids": []})"),
      HasSubstr(":2: field input_length: not an integer"));
  EXPECT_THAT(
      error(R"({"timestamp": 0, "input_length": 10, "output_length": "x", "hash_ids": []})"),
      HasSubstr(":2: field output_length: not an integer"));
  EXPECT_THAT(
      error(R"({"timestamp": 0, "input_length": 1025, "output_length": 1, "hash_ids": [1]})"),
      HasSubstr(":2: field hash_ids: 1 ids for input_length 1025, not 2 to 3"));
  EXPECT_THAT(
      error(R"({"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [-4]})"),
      HasSubstr(":2: field hash_ids[0]: not an integer >= 0"));
  EXPECT_THAT(error(R"({"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": {}})"),
              HasSubstr(":2: field hash_ids: not an array"));
}

TEST_F(TraceTest, EmptyAndMissingFilesAreErrors) {
  EXPECT_THAT(Error(TraceFormat::kMooncake, "\n \n"), HasSubstr("no requests"));
  EXPECT_THAT(Error(TraceFormat::kWeka, R"({"bs": 64, "requests": []})"), HasSubstr("no requests"));
  EXPECT_EQ(OpenTrace("/does/not/exist.jsonl", TraceFormat::kWeka).status().code(),
            absl::StatusCode::kNotFound);
}

// 8 blocks of 64 make a page; ranges may cut a page anywhere; the rest of a page has none.
TEST_F(TraceTest, WekaMergesEightBlocksIntoAPage) {
  auto requests =
      Read(TraceFormat::kWeka,
           R"({"bs": 64, "requests": [{"t": 0, "in": 1100, "out": 2, "m": "a", "h": [[1, 17]]}, )"
           R"({"t": 1, "in": 1030, "out": 2, "m": "a", "h": [[1, 10], [50, 6]]}, )"
           R"({"t": 2, "in": 1030, "out": 2, "m": "b", "h": [[1, 16]]}, )"
           R"({"t": 3, "in": 511, "out": 2, "m": "a", "h": [[1, 7]]}]})");
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_THAT((*requests)[0].pages, ElementsAre(PageId(0), PageId(1)));
  EXPECT_THAT((*requests)[1].pages, ElementsAre(PageId(0), PageId(2)));
  EXPECT_THAT((*requests)[2].pages, ElementsAre(PageId(3), PageId(4)));  // another model
  EXPECT_THAT((*requests)[3].pages, ElementsAre());
}

TEST_F(TraceTest, WekaSessionsShareNoPagesAndPausesAreCut) {
  const std::string session =
      R"({"bs": 512, "requests": [{"t": 10, "in": 512, "out": 1, "m": "a", "h": [[1, 1]]}, )"
      R"({"t": 20, "requests": [{"t": 5, "in": 512, "out": 2, "m": "a", "h": [[1, 1]]}]}, )"
      R"({"t": 90025, "in": 512, "out": 3, "m": "a", "h": [[1, 1]]}]})";
  TraceOptions options;
  options.session_start_window = absl::ZeroDuration();
  auto one = Read(TraceFormat::kWeka, session, options);
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_EQ(one->size(), 3u);
  EXPECT_EQ((*one)[0].arrival, absl::ZeroDuration());
  EXPECT_EQ((*one)[1].arrival, absl::Seconds(15));  // a sub-agent counts from its own start
  EXPECT_EQ((*one)[2].arrival, absl::Seconds(15) + absl::Hours(1));
  EXPECT_EQ(num_pages_, 1u);

  ASSERT_TRUE(Read(TraceFormat::kWeka, absl::StrCat(session, "\n", session)).ok());
  EXPECT_EQ(num_pages_, 2u);
}

TEST_F(TraceTest, WekaStartsAreSeeded) {
  std::string lines;
  for (int i = 0; i < 200; ++i) {
    lines += R"({"bs": 512, "requests": [{"t": 0, "in": 512, "out": 1, "m": "a", "h": [[1, 1]]}]})";
    lines += '\n';
  }
  const auto arrivals = [&](uint64_t seed) {
    std::vector<absl::Duration> all;
    const auto requests = Read(TraceFormat::kWeka, lines, {.seed = seed});
    EXPECT_TRUE(requests.ok()) << requests.status();
    for (const TraceRequest& r : *requests) all.push_back(r.arrival);
    return all;
  };
  EXPECT_EQ(arrivals(3), arrivals(3));
  EXPECT_NE(arrivals(3), arrivals(4));
  const std::vector<absl::Duration> all = arrivals(3);
  EXPECT_GE(all.front(), absl::ZeroDuration());
  EXPECT_LT(all.back(), absl::Hours(3));
  EXPECT_NEAR(absl::ToDoubleHours(all[100]), 1.5, 0.4);  // the median of 200 uniform draws
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end()));
}

TEST_F(TraceTest, BadWekaLinesNameLineAndField) {
  const auto request = [](const std::string& fields) {
    return absl::StrCat(R"({"bs": 64, "requests": [{"t": 0, "in": 64, "out": 1, "m": "a", )"
                        R"("h": [[1, 1]]}, {)",
                        fields, "}]}");
  };
  const auto error = [&](const std::string& line) { return Error(TraceFormat::kWeka, line); };
  EXPECT_THAT(error(R"({"bs": 0, "requests": []})"), HasSubstr(":1: field bs: not an integer"));
  EXPECT_THAT(error(R"({"bs": 96, "requests": []})"), HasSubstr("field bs: 96 does not divide"));
  EXPECT_THAT(error(R"({"bs": 64})"), HasSubstr("field requests: missing"));
  EXPECT_THAT(error(R"({"bs": 64, "requests": [3]})"),
              HasSubstr("field requests[0]: not an object"));
  EXPECT_THAT(error(request(R"("t": -1, "in": 64, "out": 1, "m": "a", "h": [])")),
              HasSubstr(":1: field requests[1].t: not a number"));
  EXPECT_THAT(error(request(R"("t": 0, "in": -64, "out": 1, "m": "a", "h": [])")),
              HasSubstr("field requests[1].in: not an integer"));
  EXPECT_THAT(error(request(R"("t": 0, "in": 64, "out": 1, "m": 4, "h": [])")),
              HasSubstr("field requests[1].m: not a string"));
  EXPECT_THAT(error(request(R"("t": 0, "in": 64, "out": 1, "m": "a", "h": [[1]])")),
              HasSubstr("field requests[1].h[0]: not a pair"));
  EXPECT_THAT(error(request(R"("t": 0, "in": 64, "out": 1, "m": "a", "h": [[-1, 1]])")),
              HasSubstr("field requests[1].h[0]: start"));
  // A few bytes that ask for 2^40 pages.
  EXPECT_THAT(error(request(R"("t": 0, "in": 64, "out": 1, "m": "a", "h": [[1, 8796093022208]])")),
              HasSubstr("field requests[1].h[0]: length is not in [1, 1] after 0 blocks"));
  EXPECT_THAT(error(request(R"("t": 0, "in": 128, "out": 1, "m": "a", "h": [[1, 1], [2, 2]])")),
              HasSubstr("field requests[1].h[1]: length is not in [1, 1] after 1 blocks"));
  EXPECT_THAT(error(request(R"("t": 0, "requests": [{"t": 0, "out": 1}])")),
              HasSubstr("field requests[1].requests[0].in: missing"));
  std::string deep = R"("t": 0, "requests": [])";
  for (int i = 0; i < 2000; ++i) deep = absl::StrCat(R"("t": 0, "requests": [{)", deep, "}]");
  EXPECT_THAT(error(request(deep)), HasSubstr("sub-agents nest deeper than 8"));
}

// Every line is within its own limits, and together they ask for more than memory has.
TEST_F(TraceTest, SumOverAllRequestsIsBounded) {
  std::string session = R"({"bs": 512, "requests": [)";
  for (int i = 0; i < 2100; ++i) {
    absl::StrAppend(&session, i == 0 ? "" : ",",
                    R"({"t": 0, "in": 16777216, "out": 1, "m": "a", "h": [[1, 32768]]})");
  }
  EXPECT_THAT(Error(TraceFormat::kWeka, session + "]}"),
              HasSubstr("pages the trace is larger than 67108864"));
}

TEST(TraceFormatTest, NamesRoundTrip) {
  for (TraceFormat format : {TraceFormat::kMooncake, TraceFormat::kWeka}) {
    EXPECT_EQ(*ParseTraceFormat(TraceFormatName(format)), format);
  }
  EXPECT_FALSE(ParseTraceFormat("csv").ok());
}

}  // namespace
}  // namespace pagetide
