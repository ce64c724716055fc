#include "clients/c/rpc.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>

struct pt_worker {
  grpc_channel* channel;
  grpc_completion_queue* queue;
};

struct pt_worker* pt_worker_connect(const char* address) {
  struct pt_worker* const worker = malloc(sizeof(*worker));
  if (worker == NULL) return NULL;
  grpc_init();
  grpc_channel_credentials* const credentials = grpc_insecure_credentials_create();
  worker->channel = grpc_channel_create(address, credentials, NULL);
  grpc_channel_credentials_release(credentials);
  worker->queue = grpc_completion_queue_create_for_pluck(NULL);
  return worker;
}

void pt_worker_close(struct pt_worker* worker) {
  grpc_channel_destroy(worker->channel);
  grpc_completion_queue_shutdown(worker->queue);
  grpc_completion_queue_destroy(worker->queue); /* for plucking: nothing is left in it */
  grpc_shutdown();
  free(worker);
}

/* Starts operations and waits for their end, which the call's deadline bounds. */
static bool Run(struct pt_worker* worker, grpc_call* call, const grpc_op* ops, size_t num_ops) {
  static char tag; /* one batch at a time */
  if (grpc_call_start_batch(call, ops, num_ops, &tag, NULL) != GRPC_CALL_OK) return false;
  const grpc_event event =
      grpc_completion_queue_pluck(worker->queue, &tag, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
  return event.type == GRPC_OP_COMPLETE && event.success != 0;
}

static void Tell(grpc_byte_buffer* message, pt_on_message on_message, void* context) {
  grpc_byte_buffer_reader reader;
  if (!grpc_byte_buffer_reader_init(&reader, message)) return;
  const grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
  on_message(context, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes));
  grpc_slice_unref(bytes);
  grpc_byte_buffer_reader_destroy(&reader);
}

bool pt_call(struct pt_worker* worker, const char* method, const struct pt_message* request,
             unsigned seconds, pt_on_message on_message, void* context, char* error,
             size_t error_size) {
  if (request->is_bad) {
    snprintf(error, error_size, "%s: no memory for the request", method);
    return false;
  }
  const gpr_timespec deadline =
      gpr_time_add(gpr_now(GPR_CLOCK_REALTIME), gpr_time_from_seconds(seconds, GPR_TIMESPAN));
  grpc_call* const call =
      grpc_channel_create_call(worker->channel, NULL, GRPC_PROPAGATE_DEFAULTS, worker->queue,
                               grpc_slice_from_static_string(method), NULL, deadline, NULL);
  grpc_slice body = grpc_slice_from_copied_buffer((const char*)request->data, request->size);
  grpc_byte_buffer* const sent = grpc_raw_byte_buffer_create(&body, 1);
  grpc_metadata_array headers, trailers;
  grpc_metadata_array_init(&headers);
  grpc_metadata_array_init(&trailers);

  grpc_op begin[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_INITIAL_METADATA}};
  begin[1].data.send_message.send_message = sent;
  begin[3].data.recv_initial_metadata.recv_initial_metadata = &headers;
  bool goes_on = Run(worker, call, begin, 4);
  while (goes_on) {
    grpc_byte_buffer* received = NULL;
    grpc_op next = {.op = GRPC_OP_RECV_MESSAGE};
    next.data.recv_message.recv_message = &received;
    goes_on = Run(worker, call, &next, 1) && received != NULL;
    if (!goes_on) break;
    Tell(received, on_message, context);
    grpc_byte_buffer_destroy(received);
  }
  grpc_status_code code = GRPC_STATUS_UNKNOWN;
  grpc_slice words = grpc_empty_slice();
  grpc_op end = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
  end.data.recv_status_on_client.trailing_metadata = &trailers;
  end.data.recv_status_on_client.status = &code;
  end.data.recv_status_on_client.status_details = &words;
  const bool has_status = Run(worker, call, &end, 1);
  const bool is_ok = has_status && code == GRPC_STATUS_OK;
  if (!is_ok) {
    char* const text = grpc_slice_to_c_string(words);
    snprintf(error, error_size, "%s: code %d: %s", method, (int)code, text);
    gpr_free(text);
  }
  grpc_slice_unref(words);
  grpc_metadata_array_destroy(&trailers);
  grpc_metadata_array_destroy(&headers);
  grpc_byte_buffer_destroy(sent);
  grpc_slice_unref(body);
  grpc_call_unref(call);
  return is_ok;
}
