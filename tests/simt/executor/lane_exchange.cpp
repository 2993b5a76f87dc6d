// Shuffles, votes, matches and reductions: what the lanes' values become when all have come.
#include <algorithm>
#include <bit>

#include "report.h"
#include "warp.h"

namespace simt {

namespace {

struct Exchange {
  int kind;
  uint64_t value;
  int operand;
  int width;
  Site site;
  uint64_t result;
  int predicate;
};

const Exchange& of(void* const* payloads, int lane) { return *static_cast<const Exchange*>(payloads[lane]); }

// Runs function(lane, exchange) for each lane of the mask.
template <typename Function>
void each(void* const* payloads, unsigned mask, const Function& function) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) function(lane, *static_cast<Exchange*>(payloads[lane]));
  }
}

// The lane that `lane` reads from: the definition of `shfl` in the PTX manual, with the values for c that the CUDA
// intrinsics pass.
int source_lane(int lane, const Exchange& exchange) {
  const int segment = kLanes - exchange.width;  // the bits of a lane's number that name its segment
  const int first = lane & segment, last = first | (31 & ~segment);
  switch (static_cast<ShuffleKind>(exchange.kind)) {
    case ShuffleKind::up: {
      const int source = lane - (exchange.operand & 31);
      return source >= first ? source : lane;
    }
    case ShuffleKind::down: {
      const int source = lane + (exchange.operand & 31);
      return source <= last ? source : lane;
    }
    case ShuffleKind::exclusive_or: {
      const int source = lane ^ (exchange.operand & 31);
      return source <= last ? source : lane;
    }
    default:
      return first | (exchange.operand & 31 & ~segment);
  }
}

unsigned reduced(ReduceKind kind, unsigned a, unsigned b) {
  switch (kind) {
    case ReduceKind::add:
      return a + b;
    case ReduceKind::min:
      return std::min(a, b);
    case ReduceKind::max:
      return std::max(a, b);
    case ReduceKind::min_signed:
      return static_cast<unsigned>(std::min(static_cast<int>(a), static_cast<int>(b)));
    case ReduceKind::max_signed:
      return static_cast<unsigned>(std::max(static_cast<int>(a), static_cast<int>(b)));
    case ReduceKind::bit_and:
      return a & b;
    case ReduceKind::bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}

}  // namespace

uint64_t shuffle(ShuffleKind kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
  if (width < 1 || width > kLanes || !std::has_single_bit(static_cast<unsigned>(width))) {
    violation_at(
        site, "divergent warp operation",
        "shuffle of width " + std::to_string(width) + ", not a power of two up to 32");
  }
  Exchange own = {static_cast<int>(kind), value, operand, width, site, 0, 0};
  meet(kShuffle, mask, &own, site, [](void* const* payloads, unsigned lanes) {
    each(payloads, lanes, [&](int lane, Exchange& exchange) {
      const int source = source_lane(lane, exchange);
      if (!(lanes >> source & 1)) {
        violation_at(
            exchange.site, "divergent warp operation",
            "lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(source) +
                ", which is not in the mask of lanes " + lanes_text(lanes));
      }
      exchange.result = of(payloads, source).value;
    });
  });
  return own.result;
}

unsigned vote(VoteKind kind, unsigned mask, int predicate, Site site) {
  Exchange own = {static_cast<int>(kind), predicate != 0, 0, 0, site, 0, 0};
  meet(kVote, mask, &own, site, [](void* const* payloads, unsigned lanes) {
    unsigned ballot = 0;
    each(payloads, lanes, [&](int lane, Exchange& exchange) {
      ballot |= static_cast<unsigned>(exchange.value) << lane;
    });
    each(payloads, lanes, [&](int, Exchange& exchange) {
      const auto what = static_cast<VoteKind>(exchange.kind);
      exchange.result = what == VoteKind::ballot ? ballot : what == VoteKind::any ? ballot != 0 : ballot == lanes;
    });
  });
  return static_cast<unsigned>(own.result);
}

unsigned match_any(unsigned mask, uint64_t value, Site site) {
  Exchange own = {0, value, 0, 0, site, 0, 0};
  meet(kMatchAny, mask, &own, site, [](void* const* payloads, unsigned lanes) {
    each(payloads, lanes, [&](int, Exchange& exchange) {
      each(payloads, lanes, [&](int lane, Exchange& other) {
        if (other.value == exchange.value) exchange.result |= 1ull << lane;
      });
    });
  });
  return static_cast<unsigned>(own.result);
}

unsigned match_all(unsigned mask, uint64_t value, int* predicate, Site site) {
  Exchange own = {0, value, 0, 0, site, 0, 0};
  meet(kMatchAll, mask, &own, site, [](void* const* payloads, unsigned lanes) {
    const uint64_t first = of(payloads, std::countr_zero(lanes)).value;
    bool equal = true;
    each(payloads, lanes, [&](int, Exchange& exchange) { equal = equal && exchange.value == first; });
    each(payloads, lanes, [&](int, Exchange& exchange) {
      exchange.result = equal ? lanes : 0;
      exchange.predicate = equal;
    });
  });
  *predicate = own.predicate;
  return static_cast<unsigned>(own.result);
}

unsigned reduce(ReduceKind kind, unsigned mask, unsigned value, Site site) {
  Exchange own = {static_cast<int>(kind), value, 0, 0, site, 0, 0};
  meet(kReduce, mask, &own, site, [](void* const* payloads, unsigned lanes) {
    const int first = std::countr_zero(lanes);
    const auto what = static_cast<ReduceKind>(of(payloads, first).kind);
    auto sum = static_cast<unsigned>(of(payloads, first).value);
    each(payloads, lanes & (lanes - 1), [&](int, Exchange& exchange) {
      sum = reduced(what, sum, static_cast<unsigned>(exchange.value));
    });
    each(payloads, lanes, [&](int, Exchange& exchange) { exchange.result = sum; });
  });
  return static_cast<unsigned>(own.result);
}

}  // namespace simt
