// Where bytes from other members of a group meet the calls that wait for them.
#include "worker/group_mailbox.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "tests/support/timing.h"

namespace pagetide {
namespace {

TEST(GroupMailboxTest, ASecondDeliveryOfOneNameDoesNotWriteIntoAReceiverThatIsDone) {
  const Clock* const clock = Clock::Real();
  GroupMailbox mailbox(clock);
  const std::vector<std::byte> bytes(64, std::byte{7});
  ChecksumStream stream;
  stream.Update(bytes);
  const std::atomic<bool> cancelled{false};
  // The receiver may not have woken yet when the second comes.
  for (uint64_t number = 1; number <= 300; ++number) {
    const DeliveryName name{.tenant = "t", .group = "g", .from = 0, .to = 1, .number = number};
    std::vector<std::byte> memory(bytes.size());
    absl::Status received;
    std::thread receiver([&] {
      received = mailbox.Receive(name, CollectiveBuffer::Of(std::span(memory)), &cancelled,
                                 clock->MonotonicNow() + absl::Seconds(30));
    });
    auto first = mailbox.Deliver(name, bytes.size(), clock->MonotonicNow() + absl::Seconds(30));
    ASSERT_TRUE(first.ok()) << first.status();
    ASSERT_TRUE((*first)->Write(bytes).ok());
    ASSERT_TRUE((*first)->Finish(stream.Get()).ok());
    const auto second = mailbox.Deliver(name, bytes.size(), clock->MonotonicNow());
    EXPECT_TRUE(absl::IsDeadlineExceeded(second.status())) << number << ": " << second.status();
    receiver.join();
    ASSERT_TRUE(received.ok()) << received;
    EXPECT_EQ(memory, bytes);
    if (second.ok()) break;
  }
}

}  // namespace
}  // namespace pagetide
