// EchoService: the server side of echo.proto over the callback API. Thread-safe.
#ifndef PAGETIDE_TESTS_RPC_ECHO_SERVICE_H_
#define PAGETIDE_TESTS_RPC_ECHO_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include "base/error_info.h"
#include "rpc/status_mapping.h"
#include "tests/rpc/echo.grpc.pb.h"

namespace pagetide {

class EchoServiceImpl final : public test::EchoService::CallbackService {
 public:
  grpc::ServerUnaryReactor* Echo(grpc::CallbackServerContext* context,
                                 const test::EchoRequest* request,
                                 test::EchoResponse* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (request->fail_code() != 0) {
      absl::Status status(static_cast<absl::StatusCode>(request->fail_code()), request->text());
      if (!request->fail_reason().empty()) {
        status = WithReason(status, request->fail_reason(),
                            {request->labels().begin(), request->labels().end()});
      }
      if (request->retry_delay_ms() > 0) {
        status = WithRetryDelay(status, absl::Milliseconds(request->retry_delay_ms()));
      }
      reactor->Finish(ToGrpcStatus(status));
      return reactor;
    }
    response->set_text(request->text());
    response->set_payload(request->payload());
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  grpc::ServerBidiReactor<test::EchoRequest, test::EchoResponse>* Chat(
      grpc::CallbackServerContext*) override {
    return new ChatReactor;
  }

 private:
  class ChatReactor final : public grpc::ServerBidiReactor<test::EchoRequest, test::EchoResponse> {
   public:
    ChatReactor() { StartRead(&request_); }
    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::OK);
      response_.set_text(request_.text());
      StartWrite(&response_);
    }
    void OnWriteDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::OK);
      StartRead(&request_);
    }
    void OnDone() override { delete this; }

   private:
    test::EchoRequest request_;
    test::EchoResponse response_;
  };
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_RPC_ECHO_SERVICE_H_
