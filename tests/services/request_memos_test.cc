#include "worker/request_memos.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "pagetide/v1/sequence.pb.h"

namespace pagetide {
namespace {

using Answer = v1::GetSequenceRequest;  // any message with a text field

class RequestMemosTest : public ::testing::Test {
 protected:
  absl::StatusOr<Answer> Call(const std::string& sequence, const std::string& id,
                              const std::string& body) {
    return memos_.OncePerSequence<Answer>(
        sequence, id, Sha256Of(body), Soon(), [&]() -> absl::StatusOr<Answer> {
          ++calls_;
          if (!failure_.ok()) return failure_;
          Answer answer;
          answer.set_sequence_id(absl::StrCat("run ", calls_.load()));
          return answer;
        });
  }
  static MonotonicTime Soon() { return Clock::Real()->MonotonicNow() + absl::Seconds(60); }

  RequestMemos memos_{RequestMemos::Options(), Clock::Real()};
  std::atomic<int> calls_{0};  // relaxed: a count
  absl::Status failure_;
};

TEST_F(RequestMemosTest, ARepeatGetsTheFirstAnswer) {
  EXPECT_EQ(Call("s", "1", "x")->sequence_id(), "run 1");
  EXPECT_EQ(Call("s", "1", "x")->sequence_id(), "run 1");
  EXPECT_EQ(calls_, 1);
  EXPECT_EQ(GetReason(Call("s", "1", "y").status()), "REQUEST_ID_REUSED");
  EXPECT_EQ(Call("other", "1", "x")->sequence_id(), "run 2");
}

TEST_F(RequestMemosTest, AFailureIsNotKept) {
  failure_ = absl::UnavailableError("no");
  EXPECT_FALSE(Call("s", "1", "x").ok());
  failure_ = absl::OkStatus();
  EXPECT_TRUE(Call("s", "1", "x").ok());
}

TEST_F(RequestMemosTest, WithoutAnIdNothingIsKept) {
  EXPECT_EQ(Call("s", "", "x")->sequence_id(), "run 1");
  EXPECT_EQ(Call("s", "", "x")->sequence_id(), "run 2");
}

TEST_F(RequestMemosTest, TheLast32OfASequenceAreKeptAndForgottenWithIt) {
  for (int i = 0; i < 33; ++i) ASSERT_TRUE(Call("s", absl::StrCat(i), "x").ok());
  EXPECT_EQ(Call("s", "1", "x")->sequence_id(), "run 2");
  EXPECT_EQ(Call("s", "0", "x")->sequence_id(), "run 34");
  memos_.ForgetSequence("s");
  EXPECT_EQ(Call("s", "32", "x")->sequence_id(), "run 35");
}

TEST_F(RequestMemosTest, RepeatsThatComeAtOnceRunOnce) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const auto answer = memos_.OncePerTenant<Answer>(
          "t", "same", Sha256Of("x"), Soon(), [&]() -> absl::StatusOr<Answer> {
            ++calls_;
            absl::SleepFor(absl::Milliseconds(20));  // long enough for the others to arrive
            return Answer();
          });
      EXPECT_TRUE(answer.ok()) << answer.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(calls_, 1);
}

TEST_F(RequestMemosTest, ALongIdIsRefused) {
  EXPECT_EQ(Call("s", std::string(257, 'x'), "x").status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace pagetide
