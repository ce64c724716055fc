// One contract for all collectives: over gRPC between real workers, and over NCCL's functions,
// which an emulation stands for where no GPU is.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error_info.h"
#include "pagetide/v1/transfer.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "tests/services/collective_fixture.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::TestContext;
using ::testing::HasSubstr;

enum class Kind { kGrpc, kNccl };

class CollectiveContractTest : public ::testing::TestWithParam<Kind> {
 protected:
  void Make(uint32_t size) {
    pools_.clear();
    members_.clear();
    for (uint32_t rank = 0; rank < size; ++rank) pools_.push_back(std::make_unique<TestPool>());
    if (GetParam() == Kind::kGrpc) {
      workers_ = std::make_unique<Workers>(size, "a secret of tests");
      members_ = workers_->MakeAll("group-1");
      return;
    }
    members_.resize(size);
    const std::string id = NcclLink(Emulated(0), Clock::Real()).MakeId().value();
    ForAll(size, [&](uint32_t rank) {
      NcclLink link(Emulated(static_cast<int>(rank)), Clock::Real());
      auto joined = link.Join(rank, size, id, Soon());
      ASSERT_TRUE(joined.ok()) << joined.status();
      members_[rank] = *std::move(joined);
    });
  }
  void FillAll(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (const auto& pool : pools_) {
      for (size_t at = 0; at < kPoolBytes; at += sizeof(uint64_t)) {
        const uint64_t word = random();
        std::memcpy(pool->bytes().data() + at, &word, sizeof(word));
      }
    }
  }
  CollectiveBuffer Buffer(uint32_t rank, uint64_t offset, uint64_t num_bytes) {
    return CollectiveBuffer::Of(pools_[rank].get(), offset, num_bytes);
  }

  std::unique_ptr<Workers> workers_;
  std::vector<std::unique_ptr<TestPool>> pools_;
  std::vector<std::unique_ptr<Collective>> members_;
};

TEST_P(CollectiveContractTest, ABroadcastGivesAllTheRootsBytesAndNothingElse) {
  for (const uint32_t size : {1, 2, 3, 5}) {
    Make(size);
    for (uint32_t root = 0; root < size; ++root) {
      for (const uint64_t num_bytes :
           {uint64_t{0}, uint64_t{1}, uint64_t{1000}, (uint64_t{3} << 20) + 5}) {
        if (num_bytes > 1000 && root + 1 < size) continue;  // once a size
        FillAll(root * 100 + num_bytes);
        std::vector<std::vector<std::byte>> before;
        for (const auto& pool : pools_) before.push_back(pool->bytes());
        ForAll(size, [&](uint32_t rank) {
          const absl::Status status =
              members_[rank]->Broadcast(root, Buffer(rank, 64, num_bytes), Soon());
          EXPECT_TRUE(status.ok()) << status;
        });
        for (uint32_t rank = 0; rank < size; ++rank) {
          std::copy_n(before[root].begin() + 64, num_bytes, before[rank].begin() + 64);
          EXPECT_EQ(pools_[rank]->bytes(), before[rank])
              << "rank " << rank << " of " << size << ", root " << root << ", " << num_bytes;
        }
      }
    }
  }
}

TEST_P(CollectiveContractTest, PairsAreMatchedInTheirOrder) {
  Make(3);
  FillAll(7);
  const std::vector<std::byte> from_0 = pools_[0]->bytes();
  const std::vector<std::byte> from_1 = pools_[1]->bytes();
  ForAll(3, [&](uint32_t rank) {
    const auto ok = [&](const absl::Status& status) { EXPECT_TRUE(status.ok()) << status; };
    Collective& me = *members_[rank];
    EXPECT_EQ(me.rank(), rank);
    EXPECT_EQ(me.size(), 3u);
    if (rank == 0) {
      ok(me.Send(2, Buffer(0, 0, 100), Soon()));
      ok(me.Send(2, Buffer(0, 1000, 2 << 20), Soon()));
      ok(me.Receive(1, Buffer(0, 5 << 20, 50), Soon()));
    } else if (rank == 1) {
      ok(me.Send(0, Buffer(1, 0, 50), Soon()));
      ok(me.Send(2, Buffer(1, 500, 70), Soon()));
    } else {
      ok(me.Receive(0, Buffer(2, 0, 100), Soon()));
      ok(me.Receive(0, Buffer(2, 200, 2 << 20), Soon()));
      ok(me.Receive(1, Buffer(2, 4 << 20, 70), Soon()));
    }
  });
  const auto equal = [](const std::vector<std::byte>& a, uint64_t at, TestPool& b, uint64_t to,
                        uint64_t count) {
    return std::equal(a.begin() + static_cast<int64_t>(at),
                      a.begin() + static_cast<int64_t>(at + count),
                      b.bytes().begin() + static_cast<int64_t>(to));
  };
  EXPECT_TRUE(equal(from_0, 0, *pools_[2], 0, 100));
  EXPECT_TRUE(equal(from_0, 1000, *pools_[2], 200, 2 << 20));
  EXPECT_TRUE(equal(from_1, 500, *pools_[2], 4 << 20, 70));
  EXPECT_TRUE(equal(from_1, 0, *pools_[0], 5 << 20, 50));
}

TEST_P(CollectiveContractTest, WhatDoesNotComeInTimeBreaksTheGroup) {
  Make(2);
  const absl::Status late = members_[0]->Receive(1, Buffer(0, 0, 100), In(absl::Milliseconds(50)));
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  for (const absl::Status& status : {members_[0]->Receive(1, Buffer(0, 0, 100), Soon()),
                                     members_[0]->Send(1, Buffer(0, 0, 100), Soon()),
                                     members_[0]->Broadcast(0, Buffer(0, 0, 100), Soon())}) {
    EXPECT_EQ(GetReason(status), "GROUP_BROKEN") << status;
  }
  const absl::Status passed = members_[1]->Receive(0, Buffer(1, 0, 100), In(-absl::Seconds(1)));
  EXPECT_TRUE(absl::IsDeadlineExceeded(passed)) << passed;
}

TEST_P(CollectiveContractTest, AnAbortEndsTheCallThatWaits) {
  Make(2);
  absl::Status status;
  std::thread waiting([&] { status = members_[0]->Receive(1, Buffer(0, 0, 100), Soon()); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // before or in it: both must end
  members_[0]->Abort();
  members_[0]->Abort();
  waiting.join();
  EXPECT_TRUE(absl::IsCancelled(status) || GetReason(status) == "GROUP_BROKEN") << status;
  EXPECT_EQ(GetReason(members_[0]->Send(1, Buffer(0, 0, 100), Soon())), "GROUP_BROKEN");
}

TEST_P(CollectiveContractTest, WhatCannotBeAskedForBreaksNothing) {
  Make(2);
  ForAll(2, [&](uint32_t rank) {
    Collective& me = *members_[rank];
    for (const absl::Status& status :
         {me.Broadcast(2, Buffer(rank, 0, 1), Soon()), me.Send(2, Buffer(rank, 0, 1), Soon()),
          me.Send(rank, Buffer(rank, 0, 1), Soon()), me.Receive(rank, Buffer(rank, 0, 1), Soon()),
          me.Receive(~uint32_t{0}, Buffer(rank, 0, 1), Soon())}) {
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    }
    const absl::Status status = me.Broadcast(1, Buffer(rank, 0, 1000), Soon());
    EXPECT_TRUE(status.ok()) << status;
  });
}

INSTANTIATE_TEST_SUITE_P(All, CollectiveContractTest, ::testing::Values(Kind::kGrpc, Kind::kNccl),
                         [](const auto& info) {
                           return info.param == Kind::kGrpc ? "Grpc" : "Nccl";
                         });

TEST(GrpcCollectiveTest, BothEndsLearnOfAnotherSize) {
  Workers workers(2, "a secret of tests");
  auto members = workers.MakeAll("g");
  std::vector<std::byte> bytes(100);
  absl::Status sent, received;
  std::thread sender([&] {
    sent = members[0]->Send(1, CollectiveBuffer::Of(std::span(bytes).first(60)), Soon());
  });
  received = members[1]->Receive(0, CollectiveBuffer::Of(std::span(bytes).first(50)), Soon());
  sender.join();
  EXPECT_TRUE(absl::IsInvalidArgument(sent)) << sent;
  EXPECT_TRUE(absl::IsInvalidArgument(received)) << received;
  EXPECT_THAT(std::string(sent.message()), HasSubstr("60 bytes, the receiver takes 50"));
}

TEST(GrpcCollectiveTest, OnlyWorkersOfTheDeploymentDeliver) {
  Workers workers(2, "a secret of tests");
  Workers strangers(1, "another secret of tests");
  auto receiver = workers.Make(1, "g");
  // Knows the group and where its members are, not the secret.
  auto stranger =
      GrpcCollective::Create({.group_id = "g",
                              .rank = 0,
                              .addresses = workers.addresses(),
                              .tenant = strangers.role(0).worker().TenantNamed("default")},
                             &strangers.role(0).group_mailbox(), Clock::Real());
  ASSERT_TRUE(stranger.ok()) << stranger.status();
  std::vector<std::byte> bytes(100);
  absl::Status received;
  std::thread waiting([&] {
    received = receiver->Receive(0, CollectiveBuffer::Of(bytes), In(absl::Milliseconds(300)));
  });
  const absl::Status sent = (*stranger)->Send(1, CollectiveBuffer::Of(bytes), Soon());
  EXPECT_EQ(GetReason(sent), "NOT_PROVEN") << sent;
  waiting.join();
  EXPECT_TRUE(absl::IsDeadlineExceeded(received)) << received;
}

TEST(GrpcCollectiveTest, RawDeliveriesWithBadInputAreRefused) {
  Workers workers(1, "a secret of tests");
  testing::WorkerClient client(workers.addresses()[0],
                               std::make_shared<const Model>(testing::MakeTestModel()));
  const auto stub = v1::TransferService::NewStub(client.channel());
  const Tenant tenant = workers.role(0).worker().TenantNamed("default");
  const auto header = [&](uint64_t num_bytes) {
    v1::DeliverBytesRequest part;
    const DeliveryName name{"default", "g", 1, 0, 1};
    part.mutable_header()->set_group_id(name.group);
    part.mutable_header()->set_from_rank(name.from);
    part.mutable_header()->set_to_rank(name.to);
    part.mutable_header()->set_number(name.number);
    part.mutable_header()->set_num_bytes(num_bytes);
    part.mutable_header()->set_proof(ProveDelivery(name, num_bytes, tenant.salt).ToBytes());
    return part;
  };
  std::vector<std::byte> bytes(100);
  // What the sender of `parts` and the receiver of 100 bytes are told.
  const auto deliver = [&](const std::vector<v1::DeliverBytesRequest>& parts) {
    absl::Status received;
    std::atomic<bool> is_over{false};
    std::thread receiver([&] {
      received = workers.role(0).group_mailbox().Receive(
          {"default", "g", 1, 0, 1}, CollectiveBuffer::Of(bytes), &is_over, Soon());
    });
    TestContext context;
    v1::DeliverBytesResponse response;
    const auto writer = stub->DeliverBytes(&context, &response);
    for (const v1::DeliverBytesRequest& part : parts) {
      if (!writer->Write(part)) break;
    }
    writer->WritesDone();
    const absl::Status sent = FromGrpcStatus(writer->Finish());
    is_over = true;
    receiver.join();
    return std::pair(sent, received);
  };
  v1::DeliverBytesRequest data, checksum;
  data.set_data(std::string(100, 'x'));
  checksum.set_checksum(std::string(16, '\0'));
  EXPECT_TRUE(absl::IsInvalidArgument(deliver({}).first));
  EXPECT_TRUE(absl::IsInvalidArgument(deliver({data}).first));
  EXPECT_TRUE(absl::IsInvalidArgument(deliver({header(100), header(100)}).first));
  EXPECT_TRUE(absl::IsInvalidArgument(deliver({header(100), data, data}).first));
  const auto damaged = deliver({header(100), data, checksum});
  EXPECT_TRUE(absl::IsDataLoss(damaged.first)) << damaged.first;
  EXPECT_TRUE(absl::IsDataLoss(damaged.second)) << damaged.second;
  EXPECT_TRUE(absl::IsDataLoss(deliver({header(100), checksum}).second));
  checksum.set_checksum("short");
  EXPECT_TRUE(absl::IsInvalidArgument(deliver({header(100), data, checksum}).first));
  // A stream that ends in the middle is the receiver's failure.
  const auto broken = deliver({header(100), data});
  EXPECT_FALSE(broken.first.ok());
  EXPECT_TRUE(absl::IsUnavailable(broken.second)) << broken.second;
}

}  // namespace
}  // namespace pagetide
