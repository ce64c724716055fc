/* Protobuf messages written and read by hand, as much as an engine in plain C needs of them: the
 * wire format is fixed (https://protobuf.dev/programming-guides/encoding), the numbers of fields
 * are those of proto/pagetide/v1. For one thread. */
#ifndef PAGETIDE_CLIENTS_C_WIRE_H_
#define PAGETIDE_CLIENTS_C_WIRE_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A message that is being written. Begins as {0}; ends with pt_free. */
struct pt_message {
  uint8_t* data;
  size_t size;
  size_t capacity;
  bool is_bad; /* memory ran out: it cannot be sent */
};
void pt_put_uint(struct pt_message* to, uint32_t field, uint64_t value);
void pt_put_bytes(struct pt_message* to, uint32_t field, const void* data, size_t size);
void pt_put_string(struct pt_message* to, uint32_t field, const char* text);
void pt_put_message(struct pt_message* to, uint32_t field, const struct pt_message* inner);
/* A packed repeated uint32. */
void pt_put_uints(struct pt_message* to, uint32_t field, const uint32_t* values, size_t count);
void pt_free(struct pt_message* message);

/* A message that is being read; what it gives points into its bytes. */
struct pt_reader {
  const uint8_t* at;
  const uint8_t* end;
  bool is_bad; /* cut short, or no message */
};
struct pt_field {
  uint32_t number;
  uint64_t value;      /* of numbers */
  const uint8_t* data; /* of strings, bytes and messages; null for numbers */
  size_t size;
};
struct pt_reader pt_read(const void* data, size_t size);
/* False at the end, and when the bytes are bad. */
bool pt_next(struct pt_reader* from, struct pt_field* field);
/* The text of a field, cut to what fits, with its end. */
void pt_text(const struct pt_field* field, char* out, size_t capacity);

#endif /* PAGETIDE_CLIENTS_C_WIRE_H_ */
