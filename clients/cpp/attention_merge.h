// MergeAttention: one attention of parts that several Attend calls computed, so that the rows of a
// context may lie on several workers.
#ifndef PAGETIDE_CLIENTS_CPP_ATTENTION_MERGE_H_
#define PAGETIDE_CLIENTS_CPP_ATTENTION_MERGE_H_

#include <span>

#include "absl/status/status.h"

namespace pagetide {

// What Attend answered for the same queries over rows that no other part has.
struct AttentionPart {
  std::span<const float> outputs;      // [num_queries, query_heads, v_dim]
  std::span<const float> log_sum_exp;  // [num_queries, query_heads]; minus infinity: saw no row
};

// outputs[i] = sum over parts of exp(part.log_sum_exp[i] - log_sum_exp[i]) * part.outputs[i], where
// log_sum_exp[i] = log of the sum over parts of exp(part.log_sum_exp[i]). Equal in value to one
// call over all rows, not in every bit. Rows that no part saw give zeros and minus infinity.
// outputs: shaped as the parts'. log_sum_exp: likewise, or empty: not wanted.
// Errors: INVALID_ARGUMENT (no parts, sizes that disagree, a log_sum_exp that is NaN or plus
// infinity); then nothing is written.
absl::Status MergeAttention(std::span<const AttentionPart> parts, std::span<float> outputs,
                            std::span<float> log_sum_exp);

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_ATTENTION_MERGE_H_
