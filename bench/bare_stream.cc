#include "bench/bare_stream.h"

#include <grpcpp/impl/codegen/method_handler.h>
#include <grpcpp/support/server_callback.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "rpc/byte_buffer.h"
#include "rpc/channel.h"
#include "rpc/metrics.h"
#include "rpc/raw_stream.h"
#include "rpc/server.h"
#include "rpc/signal.h"
#include "worker/cpu_device.h"
#include "worker/row_wire.h"

namespace pagetide::bench {
namespace {

constexpr char kReadRows[] = "/pagetide.v1.SequenceService/ReadRows";
constexpr char kAppendTokens[] = "/pagetide.v1.SequenceService/AppendTokens";
// Calls that are in flight at a time write to places of their own.
constexpr uint64_t kPlaceBytes = uint64_t{2} << 20;

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "bare_stream: %s\n", what.c_str());
  std::exit(1);
}

// What lies ready to be read, and where received rows go. Shared by all calls; thread-safe.
class Memory {
 public:
  Memory(uint64_t num_bytes, const BareStreamTuning& tuning)
      : tuning_(tuning), bytes_(num_bytes, std::byte{0x5a}) {
    if (!tuning.copy) return;
    CpuDevice device({.reserve_memory = true});
    auto pool = device.CreatePool(num_bytes);
    if (!pool.ok()) Die(pool.status().ToString());
    pool_ = *std::move(pool);
  }

  // The messages of one ReadRows call. `begin` and `end` of the request are bytes, `group` is the
  // size of a message.
  class Reading {
   public:
    Reading(const Memory& memory, const grpc::ByteBuffer& request) : memory_(memory) {
      v1::ReadRowsRequest decoded;
      if (!DecodeMessage(request, &decoded).ok() || decoded.group() == 0) return;
      end_ = std::min<uint64_t>(decoded.end(), memory.bytes_.size());
      at_ = std::min<uint64_t>(decoded.begin(), end_);
      part_bytes_ = decoded.group();
    }
    // False at the end.
    bool Next(grpc::ByteBuffer* message) {
      if (at_ == end_) return false;
      const auto part = std::span(memory_.bytes_).subspan(at_, std::min(part_bytes_, end_ - at_));
      at_ += part.size();
      v1::ReadRowsResponse header;
      header.set_num_tokens(1);
      const grpc::Slice slice = LendSlice(part, 0);  // lives as long as the process
      *message =
          EncodeWithPayload(header, v1::ReadRowsResponse::kDataFieldNumber, std::span(&slice, 1));
      return true;
    }

   private:
    const Memory& memory_;
    uint64_t at_ = 0;
    uint64_t end_ = 0;
    uint64_t part_bytes_ = 0;
  };

  // The rows of one AppendTokens call.
  class Writing {
   public:
    explicit Writing(Memory* memory)
        : memory_(memory), at_(memory->next_place_++ * kPlaceBytes % memory->bytes_.size()) {}
    void Take(AppendMessage* message) {
      const BareStreamTuning& tuning = memory_->tuning_;
      if (!tuning.copy && !tuning.checksum) return;
      if (const absl::Status decoded = message->Decode(); !decoded.ok()) Die(decoded.ToString());
      std::byte scratch[ChecksumStream::kBlockBytes];
      for (uint64_t done = 0; done < message->num_bytes();) {
        const uint64_t left = std::min<uint64_t>(message->num_bytes() - done, sizeof(scratch));
        const uint64_t size = std::min(left, memory_->bytes_.size() - at_);
        std::byte* const to = tuning.copy ? memory_->pool_->host_view() + at_ : scratch;
        message->CopyNext({to, size});
        if (tuning.checksum) checksum_.Update({to, size});
        at_ = (at_ + size) % memory_->bytes_.size();
        done += size;
      }
    }
    // Tells the checksum, so that nobody can leave it out.
    grpc::ByteBuffer Answer() const {
      v1::AppendTokensResponse response;
      response.set_appended_tokens(checksum_.Get().low);
      return EncodeMessage(response);
    }

   private:
    Memory* const memory_;
    uint64_t at_;
    ChecksumStream checksum_;
  };

 private:
  const BareStreamTuning tuning_;
  const std::vector<std::byte> bytes_;
  std::unique_ptr<DevicePool> pool_;  // null: rows are not copied
  std::atomic<uint64_t> next_place_ = 0;
};

class SyncStreams final : public v1::SequenceService::Service {
 public:
  explicit SyncStreams(Memory* memory) : memory_(memory) {
    using Handler =
        grpc::internal::BidiStreamingHandler<SyncStreams, grpc::ByteBuffer, grpc::ByteBuffer>;
    const auto replace = [this](const char* name, grpc::Status (SyncStreams::*call)(RawStream*)) {
      MarkMethodStreamed(google::protobuf::DescriptorPool::generated_pool()
                             ->FindServiceByName(v1::SequenceService::service_full_name())
                             ->FindMethodByName(name)
                             ->index(),
                         new Handler([call](SyncStreams* self, grpc::ServerContext*,
                                            RawStream* stream) { return (self->*call)(stream); },
                                     this));
    };
    replace("AppendTokens", &SyncStreams::Receive);
    replace("ReadRows", &SyncStreams::Send);
  }

 private:
  using RawStream = grpc::ServerReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;

  grpc::Status Receive(RawStream* stream) {
    Memory::Writing writing(memory_);
    AppendMessage message;
    while (stream->Read(message.buffer())) writing.Take(&message);
    stream->Write(writing.Answer());
    return grpc::Status::OK;
  }
  grpc::Status Send(RawStream* stream) {
    grpc::ByteBuffer message;
    if (!stream->Read(&message)) return grpc::Status::CANCELLED;
    for (Memory::Reading reading(*memory_, message); reading.Next(&message);) {
      if (!stream->Write(message)) return grpc::Status::CANCELLED;
    }
    return grpc::Status::OK;
  }

  Memory* const memory_;
};

class CallbackStreams final
    : public v1::SequenceService::WithRawCallbackMethod_AppendTokens<
          v1::SequenceService::WithRawCallbackMethod_ReadRows<v1::SequenceService::Service>> {
 public:
  explicit CallbackStreams(Memory* memory) : memory_(memory) {}

  grpc::ServerReadReactor<grpc::ByteBuffer>* AppendTokens(grpc::CallbackServerContext*,
                                                          grpc::ByteBuffer* response) override {
    class Receive final : public grpc::ServerReadReactor<grpc::ByteBuffer> {
     public:
      Receive(Memory* memory, grpc::ByteBuffer* response) : writing_(memory), response_(response) {
        StartRead(message_.buffer());
      }
      void OnReadDone(bool ok) override {
        if (ok) {
          writing_.Take(&message_);
          StartRead(message_.buffer());
        } else {
          *response_ = writing_.Answer();
          Finish(grpc::Status::OK);
        }
      }
      void OnDone() override { delete this; }

     private:
      Memory::Writing writing_;
      AppendMessage message_;
      grpc::ByteBuffer* const response_;
    };
    return new Receive(memory_, response);
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* ReadRows(grpc::CallbackServerContext*,
                                                       const grpc::ByteBuffer* request) override {
    class Send final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
     public:
      Send(const Memory& memory, const grpc::ByteBuffer& request) : reading_(memory, request) {
        Next();
      }
      void OnWriteDone(bool ok) override {
        if (ok) {
          Next();
        } else {
          Finish(grpc::Status::CANCELLED);
        }
      }
      void OnDone() override { delete this; }

     private:
      void Next() {
        if (reading_.Next(&message_)) {
          StartWrite(&message_);
        } else {
          Finish(grpc::Status::OK);
        }
      }

      Memory::Reading reading_;
      grpc::ByteBuffer message_;
    };
    return new Send(*memory_, *request);
  }

 private:
  Memory* const memory_;
};

}  // namespace

int RunBareStreamServer(const std::string& address, uint64_t memory_bytes,
                        const BareStreamTuning& tuning) {
  TerminationSignal termination;
  Memory memory(memory_bytes, tuning);
  std::unique_ptr<grpc::Service> service;
  if (tuning.use_callbacks) {
    service = std::make_unique<CallbackStreams>(&memory);
  } else {
    service = std::make_unique<SyncStreams>(&memory);
  }
  RpcServer::Options options;
  options.addresses = {address};
  options.metrics_address.clear();
  const auto server =
      RpcServer::Create(options, {service.get()}, std::make_shared<PrometheusMetrics>());
  if (!server.ok()) Die(server.status().ToString());
  std::printf("bare_stream ready address=%s\n", (*server)->addresses()[0].c_str());
  std::fflush(stdout);
  termination.Wait();
  (*server)->Drain(absl::ZeroDuration());
  return 0;
}

BareStreamClient::BareStreamClient(const std::string& address)
    : channel_([&] {
        auto channel = MakeBulkChannel(address, {});
        if (!channel.ok()) Die(channel.status().ToString());
        return *std::move(channel);
      }()) {}

void BareStreamClient::Read(uint64_t begin, uint64_t end, uint64_t part_bytes) {
  grpc::ClientContext context;
  v1::ReadRowsRequest request;
  request.set_begin(begin);
  request.set_end(end);
  request.set_group(static_cast<uint32_t>(part_bytes));
  const auto stream = StartRawReader(channel_.get(), kReadRows, &context, EncodeMessage(request));
  grpc::ByteBuffer message;
  uint64_t got = 0;
  while (stream->Read(&message)) got += message.Length();
  const grpc::Status status = stream->Finish();
  if (!status.ok() || got < end - begin) {
    Die(absl::StrCat("read ", end - begin, " bytes, got ", got, ": ", status.error_message()));
  }
}

void BareStreamClient::Write(std::span<const std::byte> from, uint64_t part_bytes) {
  grpc::ClientContext context;
  grpc::ByteBuffer response;
  const auto stream = StartRawWriter(channel_.get(), kAppendTokens, &context, &response);
  v1::RowPart part;
  part.set_kind(v1::ROW_KIND_K);
  part.set_num_tokens(1);
  for (uint64_t at = 0; at < from.size(); at += part_bytes) {
    const grpc::Slice slice =
        LendSlice(from.subspan(at, std::min<uint64_t>(part_bytes, from.size() - at)), 0);
    if (!stream->Write(EncodeNestedPayload(v1::AppendTokensRequest::kRowsFieldNumber, part,
                                           v1::RowPart::kDataFieldNumber, std::span(&slice, 1)))) {
      break;
    }
  }
  stream->WritesDone();
  const grpc::Status status = stream->Finish();
  if (!status.ok()) Die(absl::StrCat("write: ", status.error_message()));
}

}  // namespace pagetide::bench
