// Every operation of FEATURES B is an RPC of a worker: asked of its own server reflection, so that
// what is checked is what a client that knows no .proto finds.
#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/dynamic_message.h>
#include <google/protobuf/text_format.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "kvstore/memory_page_store.h"
#include "rpc/byte_buffer.h"
#include "rpc/channel.h"
#include "services/worker_role.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

// The types of the reflection service are linked in, but have no header.
std::unique_ptr<google::protobuf::Message> MakeMessage(const std::string& type,
                                                       const std::string& text = "") {
  const auto* descriptor =
      google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(type);
  EXPECT_NE(descriptor, nullptr) << type;
  std::unique_ptr<google::protobuf::Message> message(
      google::protobuf::MessageFactory::generated_factory()->GetPrototype(descriptor)->New());
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, message.get())) << text;
  return message;
}

// The methods of a service as the server describes them.
std::set<std::string> MethodsOf(const std::string& address, const std::string& service) {
  grpc::GenericStub stub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  grpc::CompletionQueue queue;
  void* tag = nullptr;
  bool ok = false;
  const auto step = [&] { return queue.Next(&tag, &ok) && ok; };
  const auto call = stub.PrepareCall(
      &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  call->StartCall(nullptr);
  EXPECT_TRUE(step());
  call->Write(EncodeMessage(*MakeMessage("grpc.reflection.v1alpha.ServerReflectionRequest",
                                         absl::StrCat("file_containing_symbol: '", service, "'"))),
              nullptr);
  EXPECT_TRUE(step());
  grpc::ByteBuffer bytes;
  call->Read(&bytes, nullptr);
  EXPECT_TRUE(step());
  call->WritesDone(nullptr);
  EXPECT_TRUE(step());
  grpc::Status status;
  call->Finish(&status, nullptr);
  EXPECT_TRUE(step() && status.ok()) << status.error_message();
  const auto response = MakeMessage("grpc.reflection.v1alpha.ServerReflectionResponse");
  EXPECT_TRUE(DecodeMessage(bytes, response.get()).ok());
  // file_descriptor_response.file_descriptor_proto, each a serialized FileDescriptorProto.
  std::set<std::string> methods;
  const auto* reflection = response->GetReflection();
  const auto* field = response->GetDescriptor()->FindFieldByName("file_descriptor_response");
  const google::protobuf::Message& files = reflection->GetMessage(*response, field);
  const auto* list = files.GetDescriptor()->FindFieldByName("file_descriptor_proto");
  for (int i = 0; i < files.GetReflection()->FieldSize(files, list); ++i) {
    google::protobuf::FileDescriptorProto file;
    EXPECT_TRUE(file.ParseFromString(files.GetReflection()->GetRepeatedString(files, list, i)));
    for (const auto& each : file.service()) {
      if (absl::StrCat(file.package(), ".", each.name()) != service) continue;
      for (const auto& method : each.method()) methods.insert(method.name());
    }
  }
  return methods;
}

TEST(FeatureRpcsTest, EachOperationOfTheAlgebraIsOneCall) {
  testing::TempDir dir;
  MemoryPageStore store;
  WorkerRole::Options options;
  options.worker.pool_bytes = 1 << 20;
  options.worker.deployment_secret = "a secret of tests";
  options.local_plane.socket_path = dir / "worker.sock";
  auto role = WorkerRole::Start(options, &store, Clock::Real());
  ASSERT_TRUE(role.ok()) << role.status();
  struct Operation {
    const char* feature;
    const char* service;
    const char* method;
  };
  constexpr Operation kOperations[] = {
      {"B1", "SequenceEditService", "ClearSequence"},
      {"B1", "AdminService", "ClearCache"},
      {"B2", "SequenceEditService", "RemoveRange"},
      {"B3", "SequenceEditService", "CopyRange"},
      {"B4", "SequenceEditService", "KeepOnly"},
      {"B4", "SequenceService", "ForkSequence"},
      {"B4", "SequenceEditService", "Rewind"},
      {"B5", "SequenceEditService", "ShiftPositions"},
      {"B6", "SequenceEditService", "DividePositions"},
      {"B7", "SequenceEditService", "ShiftWindow"},
      {"B8", "SequenceEditService", "GetPositionExtent"},
      {"B10", "SequenceEditService", "EditSequence"},
      {"B11", "SequenceEditService", "ReorderSequences"},
      {"B12", "SequenceService", "ReserveSlots"},
      {"B12", "SequenceService", "Accept"},
      {"B13", "SequenceService", "GetBlockTable"},
      {"B13", "AdminService", "DumpFrames"},
      {"A10", "SequenceEditService", "Compact"},
      {"A12", "PrefixService", "ExtendMatch"},
  };
  std::map<std::string, std::set<std::string>> found;
  for (const Operation& operation : kOperations) {
    const std::string service = absl::StrCat("pagetide.v1.", operation.service);
    if (!found.contains(service)) found[service] = MethodsOf((*role)->address(), service);
    EXPECT_TRUE(found[service].contains(operation.method))
        << operation.feature << ": " << service << "/" << operation.method;
  }
}

}  // namespace
}  // namespace pagetide
