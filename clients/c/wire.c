#include "clients/c/wire.h"

#include <stdlib.h>
#include <string.h>

enum { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

static void Append(struct pt_message* to, const void* data, size_t size) {
  if (to->is_bad || size == 0) return;
  if (size > to->capacity - to->size) {
    size_t capacity = to->capacity == 0 ? 256 : to->capacity;
    while (capacity - to->size < size) capacity *= 2;
    uint8_t* const grown = realloc(to->data, capacity);
    if (grown == NULL) {
      to->is_bad = true;
      return;
    }
    to->data = grown;
    to->capacity = capacity;
  }
  memcpy(to->data + to->size, data, size);
  to->size += size;
}

static void AppendVarint(struct pt_message* to, uint64_t value) {
  uint8_t bytes[10];
  size_t size = 0;
  do {
    bytes[size] = (uint8_t)(value & 0x7F);
    value >>= 7;
    if (value != 0) bytes[size] |= 0x80;
    ++size;
  } while (value != 0);
  Append(to, bytes, size);
}

void pt_put_uint(struct pt_message* to, uint32_t field, uint64_t value) {
  AppendVarint(to, (uint64_t)field << 3 | kVarint);
  AppendVarint(to, value);
}

void pt_put_bytes(struct pt_message* to, uint32_t field, const void* data, size_t size) {
  AppendVarint(to, (uint64_t)field << 3 | kBytes);
  AppendVarint(to, size);
  Append(to, data, size);
}

void pt_put_string(struct pt_message* to, uint32_t field, const char* text) {
  pt_put_bytes(to, field, text, strlen(text));
}

void pt_put_message(struct pt_message* to, uint32_t field, const struct pt_message* inner) {
  to->is_bad = to->is_bad || inner->is_bad;
  pt_put_bytes(to, field, inner->data, inner->size);
}

void pt_put_uints(struct pt_message* to, uint32_t field, const uint32_t* values, size_t count) {
  struct pt_message packed = {0};
  for (size_t i = 0; i < count; ++i) AppendVarint(&packed, values[i]);
  pt_put_message(to, field, &packed);
  pt_free(&packed);
}

void pt_free(struct pt_message* message) {
  free(message->data);
  *message = (struct pt_message){0};
}

struct pt_reader pt_read(const void* data, size_t size) {
  const uint8_t* const at = data;
  return (struct pt_reader){at, size == 0 ? at : at + size, false};
}

static uint64_t ReadVarint(struct pt_reader* from) {
  uint64_t value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    if (from->at == from->end) break;
    const uint8_t byte = *from->at++;
    value |= (uint64_t)(byte & 0x7F) << shift;
    if (byte < 0x80) return value;
  }
  from->is_bad = true;
  return 0;
}

bool pt_next(struct pt_reader* from, struct pt_field* field) {
  if (from->is_bad || from->at == from->end) return false;
  const uint64_t key = ReadVarint(from);
  *field = (struct pt_field){.number = (uint32_t)(key >> 3)};
  size_t fixed = 0;
  switch (key & 7) {
    case kVarint:
      field->value = ReadVarint(from);
      return !from->is_bad;
    case kBytes: {
      const uint64_t size = ReadVarint(from);
      if (from->is_bad || size > (size_t)(from->end - from->at)) break;
      field->data = from->at;
      field->size = (size_t)size;
      from->at += size;
      return true;
    }
    case kFixed64:
    case kFixed32:
      fixed = (key & 7) == kFixed64 ? 8 : 4;
      if (fixed > (size_t)(from->end - from->at)) break;
      for (size_t i = 0; i < fixed; ++i) field->value |= (uint64_t)from->at[i] << (8 * i);
      from->at += fixed;
      return true;
    default:
      break;
  }
  from->is_bad = true;
  return false;
}

void pt_text(const struct pt_field* field, char* out, size_t capacity) {
  const size_t size = field->size < capacity - 1 ? field->size : capacity - 1;
  if (size > 0) memcpy(out, field->data, size);
  out[size] = '\0';
}
