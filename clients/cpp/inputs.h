// Inputs of a prompt that are no tokens, as requests carry them.
#ifndef PAGETIDE_CLIENTS_CPP_INPUTS_H_
#define PAGETIDE_CLIENTS_CPP_INPUTS_H_

#include <span>

#include "core/keys.h"
#include "pagetide/v1/prefix.pb.h"

namespace pagetide {

inline void AddInputs(std::span<const PositionedInput> inputs,
                      google::protobuf::RepeatedPtrField<v1::InputDigest>* to) {
  for (const PositionedInput& input : inputs) {
    v1::InputDigest* const proto = to->Add();
    proto->set_position(input.position);
    proto->set_digest(input.digest.ToBytes());
  }
}

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_INPUTS_H_
