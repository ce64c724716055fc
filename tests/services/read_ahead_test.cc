#include "services/read_ahead.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace pagetide {
namespace {

using Stream = ReadAhead<size_t>;  // a message is the number of its item

TEST(ReadAheadTest, WhatDrainsBetweenTwoStepsOfAReaderIsReadOn) {
  Stream stream(8, 4);
  ASSERT_TRUE(stream.Begin().start_reader);
  Stream::Turn turn = stream.ReaderTurn(absl::OkStatus());
  const size_t* on_its_way = nullptr;
  // Nothing is written while it reads, so that it pauses.
  while (turn.read) {
    stream.Push(*turn.read, 2);
    turn = stream.ReaderTurn(absl::OkStatus());
    if (turn.write != nullptr) on_its_way = turn.write;
  }
  ASSERT_NE(on_its_way, nullptr);
  // The pausing reader has had its last turn; all that is queued goes out before anything else.
  int num_started = 0;
  for (int i = 0; i < 2; ++i) {
    const Stream::Turn after = stream.WriterTurn(absl::OkStatus());
    num_started += after.start_reader ? 1 : 0;
    EXPECT_FALSE(after.finish.has_value());
  }
  EXPECT_EQ(num_started, 1);
}

TEST(ReadAheadTest, ACancelledStreamEndsThoughNobodyIsAtWork) {
  Stream stream(8, 4);
  ASSERT_TRUE(stream.Begin().start_reader);
  // There is no task to run: the reader's turn that says so.
  const Stream::Turn failed = stream.ReaderTurn(absl::ResourceExhaustedError("the queue is full"));
  ASSERT_TRUE(failed.finish.has_value());
  EXPECT_TRUE(absl::IsResourceExhausted(*failed.finish));
  EXPECT_FALSE(stream.CancelTurn(absl::CancelledError("left")).finish.has_value());  // once only

  Stream writing(1, 4);
  ASSERT_TRUE(writing.Begin().start_reader);
  ASSERT_TRUE(writing.ReaderTurn(absl::OkStatus()).read.has_value());
  writing.Push(0, 2);
  ASSERT_NE(writing.ReaderTurn(absl::OkStatus()).write, nullptr);
  EXPECT_FALSE(writing.CancelTurn(absl::CancelledError("left")).finish.has_value());
  const Stream::Turn last = writing.WriterTurn(absl::CancelledError("broken"));
  ASSERT_TRUE(last.finish.has_value());
  EXPECT_EQ(last.finish->message(), "left");
}

TEST(ReadAheadTest, AnEmptyStreamEndsAtOnce) {
  Stream stream(0, 4);
  const Stream::Turn turn = stream.Begin();
  EXPECT_FALSE(turn.start_reader);
  ASSERT_TRUE(turn.finish.has_value());
  EXPECT_TRUE(turn.finish->ok());
}

// All orders in which a reader, a writer and a caller who may leave can take their steps.
class Schedule {
 public:
  struct Setup {
    size_t num_items = 0;
    uint64_t item_bytes = 0;
    uint64_t max_queued = 0;
    bool may_cancel = false;
    bool may_break = false;   // a write may fail
    bool may_refuse = false;  // a task may find no thread
  };
  explicit Schedule(const Setup& setup) : setup_(setup) {}

  // Runs every schedule; their number.
  size_t RunAll() {
    size_t num_schedules = 0;
    do {
      RunOne();
      ++num_schedules;
    } while (!::testing::Test::HasFailure() && Advance());
    return num_schedules;
  }

 private:
  enum class Reader { kNone, kStarting, kReading, kRead };

  // The next of `count` ways to go on.
  size_t Choose(size_t count) {
    if (at_ == choices_.size()) choices_.push_back({0, count});
    EXPECT_EQ(choices_[at_].count, count);
    return choices_[at_++].taken;
  }
  bool Advance() {
    while (!choices_.empty() && choices_.back().taken + 1 == choices_.back().count) {
      choices_.pop_back();
    }
    if (choices_.empty()) return false;
    ++choices_.back().taken;
    return true;
  }

  void Take(const Stream::Turn& turn, bool is_readers) {
    if (is_readers) {
      reader_ = turn.read ? Reader::kReading : Reader::kNone;
      if (turn.read) item_ = *turn.read;
    } else {
      ASSERT_FALSE(turn.read.has_value());
    }
    if (turn.start_reader) {
      ASSERT_EQ(reader_, Reader::kNone) << "two readers";
      reader_ = Reader::kStarting;
    }
    if (turn.write != nullptr) {
      ASSERT_EQ(on_its_way_, nullptr) << "two writes";
      on_its_way_ = turn.write;
    }
    if (turn.finish) {
      ASSERT_FALSE(end_.has_value()) << "ended twice";
      ASSERT_EQ(reader_, Reader::kNone) << "ended under its reader";
      ASSERT_EQ(on_its_way_, nullptr) << "ended under its writer";
      end_ = turn.finish;
    }
  }

  void RunOne() {
    at_ = 0;
    Stream stream(setup_.num_items, setup_.max_queued);
    reader_ = Reader::kNone;
    on_its_way_ = nullptr;
    end_.reset();
    bool has_left = false;
    std::vector<size_t> sent;
    Take(stream.Begin(), false);
    for (;;) {
      enum class Step { kReader, kWriter, kCancel };
      std::vector<Step> steps;
      if (reader_ != Reader::kNone) steps.push_back(Step::kReader);
      if (on_its_way_ != nullptr) steps.push_back(Step::kWriter);
      if (setup_.may_cancel && !has_left) steps.push_back(Step::kCancel);
      if (steps.empty()) break;
      switch (steps[Choose(steps.size())]) {
        case Step::kReader:
          if (reader_ == Reader::kReading) {
            stream.Push(item_, setup_.item_bytes);
            reader_ = Reader::kRead;
          } else {
            const bool is_refused =
                reader_ == Reader::kStarting && setup_.may_refuse && Choose(2) == 1;
            Take(stream.ReaderTurn(is_refused ? absl::ResourceExhaustedError("no thread")
                                              : absl::OkStatus()),
                 true);
          }
          break;
        case Step::kWriter: {
          const bool is_broken = setup_.may_break && Choose(2) == 1;
          if (!is_broken) sent.push_back(*on_its_way_);
          on_its_way_ = nullptr;
          Take(stream.WriterTurn(is_broken ? absl::CancelledError("broken") : absl::OkStatus()),
               false);
          break;
        }
        case Step::kCancel:
          has_left = true;
          Take(stream.CancelTurn(absl::CancelledError("left")), false);
          break;
      }
      if (::testing::Test::HasFailure()) break;
    }
    const auto schedule = [this] {
      return absl::StrJoin(choices_, " ", [](std::string* out, const Choice& choice) {
        absl::StrAppend(out, choice.taken);
      });
    };
    ASSERT_TRUE(end_.has_value()) << "nobody is at work, and it has not ended: " << schedule();
    if (end_->ok()) {
      ASSERT_EQ(sent.size(), setup_.num_items) << schedule();
    }
    for (size_t i = 0; i < sent.size(); ++i) ASSERT_EQ(sent[i], i) << schedule();
  }

  struct Choice {
    size_t taken;
    size_t count;
  };
  const Setup setup_;
  std::vector<Choice> choices_;
  size_t at_ = 0;
  Reader reader_ = Reader::kNone;
  size_t item_ = 0;
  const size_t* on_its_way_ = nullptr;
  std::optional<absl::Status> end_;
};

TEST(ReadAheadTest, EveryScheduleSendsAllInOrderAndEnds) {
  for (size_t num_items = 1; num_items <= 6; ++num_items) {
    EXPECT_GE(Schedule({.num_items = num_items, .item_bytes = 2, .max_queued = 4}).RunAll(), 1u);
  }
}

TEST(ReadAheadTest, EveryScheduleEndsWhateverFails) {
  const size_t num_schedules = Schedule({.num_items = 3,
                                         .item_bytes = 2,
                                         .max_queued = 4,
                                         .may_cancel = true,
                                         .may_break = true,
                                         .may_refuse = true})
                                   .RunAll();
  EXPECT_GT(num_schedules, 100u);
}

}  // namespace
}  // namespace pagetide
