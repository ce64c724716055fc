// `pagetide sequences show ID`: a readable map of one sequence: what is where, who shares it, what
// is still to be rotated.
#ifndef PAGETIDE_CLI_SEQUENCE_MAP_H_
#define PAGETIDE_CLI_SEQUENCE_MAP_H_

#include <ostream>

#include "pagetide/v1/sequence.pb.h"

namespace pagetide {

// A heading, a strip of one letter a page for each layer group, and one line an extent.
void PrintSequenceMap(const v1::GetBlockTableResponse& table, std::ostream& out);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_SEQUENCE_MAP_H_
