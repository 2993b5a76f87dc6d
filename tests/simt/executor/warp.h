// Meetings of the lanes of a warp.
#pragma once

#include <cstring>
#include <string>

#include "machine.h"

namespace simt {

enum Operation : int {
  kSyncWarp,
  kActiveMask,
  kShuffle,
  kVote,
  kMatchAny,
  kMatchAll,
  kReduce,
  kLoadMatrices,
  kMultiply,
};

const char* operation_name(int operation);
std::string lanes_text(unsigned lanes);  // "0-15, 17"

inline bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// What the last lane to arrive runs for all; payloads of lanes outside the mask are null.
using Perform = void (*)(void* const payloads[kLanes], unsigned mask);

// Waits for the lanes of `mask` at the same operation and site; on return it has been performed.
void meet(Operation operation, unsigned mask, void* payload, Site site, Perform perform);

// When nothing else can run: lanes that asked for the active mask learn who came along. False when there were none.
bool release_active_masks();

}  // namespace simt
