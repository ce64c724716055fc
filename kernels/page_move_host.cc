#include "kernels/page_move.h"

#include <cstring>

namespace pagetide::kernels {

const char* CheckPageMoveArgs(const PageMoveArgs& args) {
  if (args.num_planes < 0 || args.num_pages < 0) {
    return "num_planes and num_pages must not be negative";
  }
  if (args.engine_page_tokens < 1) return "engine_page_tokens must be at least 1";
  if (args.num_heads < 1 || args.head_bytes < 1) {
    return "num_heads and head_bytes must be at least 1";
  }
  for (int32_t p = 0; p < args.num_planes; ++p) {
    if (args.planes[p].base == nullptr) return "plane: base must not be null";
    if (args.planes[p].page_offset < 0) return "plane: page_offset must not be negative";
  }
  for (int64_t i = 0; i < args.num_pages; ++i) {
    const PageTokens& tokens = args.pages[i];
    if (tokens.num_tokens < 0 || tokens.first_token < 0) {
      return "page: first_token and num_tokens must not be negative";
    }
    if (tokens.num_tokens > args.max_tokens) return "page: num_tokens exceeds max_tokens";
    if (tokens.num_tokens > 0 && (tokens.page == nullptr || tokens.slots == nullptr)) {
      return "page: page and slots must not be null";
    }
    for (int32_t t = 0; t < tokens.num_tokens; ++t) {
      if (tokens.slots[t] < -1) return "page: a slot is below -1";
    }
  }
  return nullptr;
}

void PageMoveHost(const PageMoveArgs& args) {
  const int64_t row_bytes = args.num_heads * args.head_bytes;
  for (int64_t i = 0; i < args.num_pages; ++i) {
    const PageTokens& tokens = args.pages[i];
    for (int32_t p = 0; p < args.num_planes; ++p) {
      const EnginePlane& plane = args.planes[p];
      // Heads that lie side by side move as one.
      const bool whole = plane.engine_head_bytes == args.head_bytes || args.num_heads == 1;
      const int32_t pieces = whole ? 1 : args.num_heads;
      const size_t piece_bytes = static_cast<size_t>(row_bytes / pieces);
      char* row =
          static_cast<char*>(tokens.page) + plane.page_offset + tokens.first_token * row_bytes;
      for (int32_t t = 0; t < tokens.num_tokens; ++t, row += row_bytes) {
        const int64_t slot = tokens.slots[t];
        if (slot < 0) continue;
        char* place = static_cast<char*>(plane.base) +
                      slot / args.engine_page_tokens * plane.engine_page_bytes +
                      slot % args.engine_page_tokens * plane.engine_token_bytes;
        for (int32_t h = 0; h < pieces; ++h) {
          char* in_engine = place + h * plane.engine_head_bytes;
          char* in_page = row + h * args.head_bytes;
          if (args.direction == PageMoveDirection::kGather) {
            std::memcpy(in_page, in_engine, piece_bytes);
          } else {
            std::memcpy(in_engine, in_page, piece_bytes);
          }
        }
      }
    }
  }
}

}  // namespace pagetide::kernels
