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
                              const std::string& body, const std::string& tenant = "t") {
    return memos_.OncePerSequence<Answer>(
        tenant, sequence, id, Sha256Of(body), Soon(), [&]() -> absl::StatusOr<Answer> {
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
  memos_.ForgetSequence("another", "s");
  EXPECT_EQ(Call("s", "32", "x")->sequence_id(), "run 33");
  memos_.ForgetSequence("t", "s");
  EXPECT_EQ(Call("s", "32", "x")->sequence_id(), "run 35");
}

TEST_F(RequestMemosTest, AnotherTenantGetsNoAnswerOfAnyonesSequence) {
  EXPECT_EQ(Call("s", "1", "x", "a")->sequence_id(), "run 1");
  EXPECT_EQ(Call("s", "1", "x", "b")->sequence_id(), "run 2");
  // Not even that the id was used.
  EXPECT_EQ(Call("s", "1", "another body", "c")->sequence_id(), "run 3");
  // However the names are cut.
  EXPECT_EQ(Call("bs", "1", "x", "a")->sequence_id(), "run 4");
  EXPECT_EQ(Call("s", "1", "x", "ab")->sequence_id(), "run 5");
}

TEST_F(RequestMemosTest, WhatFailsLeavesNoScopeBehind) {
  failure_ = absl::NotFoundError("no such sequence");
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(Call(absl::StrCat("s", i), "1", "x").ok());
  EXPECT_EQ(memos_.num_scopes(), 0u);
  EXPECT_EQ(memos_.num_bytes(), 0u);
}

TEST_F(RequestMemosTest, AllScopesTogetherAreBoundedInBytes) {
  RequestMemos::Options options;
  options.max_bytes = 10'000;
  RequestMemos memos(options, Clock::Real());
  int calls = 0;
  const auto call = [&](const std::string& sequence) {
    return memos.OncePerSequence<Answer>("t", sequence, "1", Sha256Of("x"), Soon(),
                                         [&]() -> absl::StatusOr<Answer> {
                                           ++calls;
                                           Answer answer;
                                           answer.set_sequence_id(std::string(3000, 'a'));
                                           return answer;
                                         });
  };
  for (const char* sequence : {"a", "b", "a", "c"}) ASSERT_TRUE(call(sequence).ok());
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(memos.num_scopes(), 3u);
  ASSERT_TRUE(call("d").ok());  // the one used least recently goes
  EXPECT_EQ(memos.num_scopes(), 3u);
  EXPECT_LE(memos.num_bytes(), 10'000u);
  ASSERT_TRUE(call("a").ok());
  EXPECT_EQ(calls, 4);
  ASSERT_TRUE(call("b").ok());
  EXPECT_EQ(calls, 5);
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
