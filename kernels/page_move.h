// Page gather and scatter: moves rows between pages in the canonical layout (page-major: all layers
// of a page contiguous, rows token-major) and an engine's own pool (layer-major: one tensor a layer
// and kind, tokens at slots the engine chose). Plain C++17 PODs, shared with device code; no state,
// thread-safe.
//
// Engine pools differ in the order of tokens and heads inside their pages. Both orders are strides:
//   NHD  [pages, tokens, heads, head_bytes]   token_bytes = heads * head_bytes
//   HND  [pages, heads, tokens, head_bytes]   token_bytes = head_bytes
// A slot is the engine's number of a token's place: page slot / page_tokens, token slot %
// page_tokens of it. Slot -1 is no place: the token is skipped.
#ifndef PAGETIDE_KERNELS_PAGE_MOVE_H_
#define PAGETIDE_KERNELS_PAGE_MOVE_H_

#include <cstdint>

#include "kernels/cuda_stream.h"

namespace pagetide::kernels {

enum class PageMoveDirection : uint8_t {
  kGather,   // engine pool -> pages
  kScatter,  // pages -> engine pool
};

// The K rows, or the V rows, of one layer.
struct EnginePlane {
  void* base;                  // engine: [engine pages, …], by the strides below
  int64_t engine_page_bytes;   // stride between engine pages
  int64_t engine_token_bytes;  // stride between tokens of an engine page
  int64_t engine_head_bytes;   // stride between heads of a token
  int64_t page_offset;         // canonical page: byte of this plane's row of slot 0
};

// Tokens of one canonical page.
struct PageTokens {
  void* page;            // canonical page, byte 0
  const int64_t* slots;  // [num_tokens] engine slots, or -1
  int32_t first_token;   // slot of the first one in the canonical page
  int32_t num_tokens;
};

struct PageMoveArgs {
  PageMoveDirection direction;
  const EnginePlane* planes;  // [num_planes]
  int32_t num_planes;
  const PageTokens* pages;  // [num_pages]
  int64_t num_pages;
  int32_t max_tokens;          // the largest num_tokens: sizes the grid of a device
  int32_t engine_page_tokens;  // tokens an engine page holds, >= 1
  int32_t num_heads;           // of every plane
  int64_t head_bytes;          // payload of one head; a canonical row is num_heads * head_bytes
};

// Returns null when `args` keeps the rules above, else a sentence that names the field.
const char* CheckPageMoveArgs(const PageMoveArgs& args);

// CPU twin, one thread.
void PageMoveHost(const PageMoveArgs& args);
int PageMoveCuda(const PageMoveArgs& args, CudaStream stream);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_PAGE_MOVE_H_
