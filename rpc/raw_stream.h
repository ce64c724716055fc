// Client calls whose messages are byte buffers (rpc/byte_buffer.h), for the bulk path: what a
// generated blocking stub does, with grpc::ByteBuffer in the place of the messages. Blocking; one
// thread at a time, except that a context may be cancelled from anywhere.
#ifndef PAGETIDE_RPC_RAW_STREAM_H_
#define PAGETIDE_RPC_RAW_STREAM_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/sync_stream.h>

#include <memory>

namespace pagetide {

using RawReader = grpc::ClientReader<grpc::ByteBuffer>;
using RawWriter = grpc::ClientWriter<grpc::ByteBuffer>;

// One request, many answers. `method` is a full name, "/package.Service/Method", that outlives the
// call; so does `context`.
inline std::unique_ptr<RawReader> StartRawReader(grpc::Channel* channel, const char* method,
                                                 grpc::ClientContext* context,
                                                 const grpc::ByteBuffer& request) {
  const grpc::internal::RpcMethod rpc(method, grpc::internal::RpcMethod::SERVER_STREAMING);
  return std::unique_ptr<RawReader>(grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(
      channel, rpc, context, request));
}

// Many requests, one answer: `response` is valid after an OK Finish.
inline std::unique_ptr<RawWriter> StartRawWriter(grpc::Channel* channel, const char* method,
                                                 grpc::ClientContext* context,
                                                 grpc::ByteBuffer* response) {
  const grpc::internal::RpcMethod rpc(method, grpc::internal::RpcMethod::CLIENT_STREAMING);
  return std::unique_ptr<RawWriter>(grpc::internal::ClientWriterFactory<grpc::ByteBuffer>::Create(
      channel, rpc, context, response));
}

}  // namespace pagetide

#endif  // PAGETIDE_RPC_RAW_STREAM_H_
