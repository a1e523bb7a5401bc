#include "ops/logit_loss.h"

#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

#define DNKD_ROWS_FILE "ops/cpu/logit_loss_rows.inc"
#include "common/for_each_isa.h"

namespace dnkd {
namespace {

int64_t label_at(const LogitLossParams& p, int64_t row) {
  return p.label_is_int32 ? static_cast<const int32_t*>(p.label)[row]
                          : static_cast<const int64_t*>(p.label)[row];
}

// ignore_index means nothing beside probabilities.
bool can_ignore(const LogitLossParams& p) {
  return p.label != nullptr && p.probabilities == nullptr;
}

int64_t counted_rows(const LogitLossParams& p) {
  if (!can_ignore(p)) {
    return p.rows;
  }
  int64_t counted = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    counted += label_at(p, i) != p.ignore_index;
  }
  return counted;
}

template <typename Scalar>
void forward(const LogitLossParams& p) {
  const auto weight = [](double factor, const void* scale) {
    return scale == nullptr ? factor
                            : factor * static_cast<double>(*static_cast<const Scalar*>(scale));
  };
  // What multiplies the sums over rows, in the loss and in the terms by themselves.
  double ce_share = 1, kd_share = 1;
  if (p.reduction == Reduction::kMean) {
    const auto counted = static_cast<double>(std::max<int64_t>(counted_rows(p), 1));
    ce_share /= counted;
    kd_share /= p.decoupled ? counted : static_cast<double>(std::max<int64_t>(p.rows, 1));
  }
  const double ce_weight = weight(p.ce_weight, p.ce_scale);
  const double kd_weight = weight(p.kd_weight, p.kd_scale);
  const bool is_none = p.reduction == Reduction::kNone;
  std::vector<Scalar> own_rows(is_none ? 0 : 2 * p.rows);
  Scalar* ce_rows = is_none ? static_cast<Scalar*>(p.ce) : own_rows.data();
  Scalar* kd_rows = is_none ? static_cast<Scalar*>(p.kd) : own_rows.data() + p.rows;
  const Isa isa = active_isa();
  // The exponentials of two rows take some twenty times as long as reading them.
  parallel_rows(p.rows, 8 * p.columns, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Scalar[]> scratch(new Scalar[3 * p.columns]);
    DNKD_CALL_ISA(isa, logit_forward, p, ce_weight * ce_share, kd_weight * kd_share, scratch.get(),
                  ce_rows, kd_rows, begin, end);
  });
  auto* loss = static_cast<Scalar*>(p.loss);
  // Of an ignored row not weight * 0, which is NaN for an infinite weight.
  const auto total = [&](double ce, double kd, bool ignored) {
    return static_cast<Scalar>((p.has_ce && !ignored ? ce_weight * ce : 0) +
                               (p.decoupled && ignored ? 0 : kd_weight * kd));
  };
  if (is_none) {
    for (int64_t i = 0; i < p.rows; ++i) {
      const bool ignored = can_ignore(p) && label_at(p, i) == p.ignore_index;
      loss[i] = total(ce_rows[i], kd_rows[i], ignored);
    }
    return;
  }
  // In row order whatever the number of threads: the same sum at every run.
  double ce = 0, kd = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    ce += static_cast<double>(ce_rows[i]);
    kd += static_cast<double>(kd_rows[i]);
  }
  *static_cast<Scalar*>(p.ce) = static_cast<Scalar>(ce * ce_share);
  *static_cast<Scalar*>(p.kd) = static_cast<Scalar>(kd * kd_share);
  *loss = total(ce * ce_share, kd * kd_share, false);
}

}  // namespace

int64_t logit_loss_find_bad_label_cpu(const LogitLossParams& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t label = label_at(p, i);
    if ((label < 0 || label >= p.columns) && !(can_ignore(p) && label == p.ignore_index)) {
      return i;
    }
  }
  return -1;
}

void logit_loss_forward_cpu(const LogitLossParams& p) {
  p.dtype == Dtype::kFloat64 ? forward<double>(p) : forward<float>(p);
}

void logit_loss_backward_cpu(const LogitLossBackwardParams& p) {
  const Isa isa = active_isa();
  parallel_rows(p.rows, 8 * p.columns, [&](int64_t begin, int64_t end) {
    DNKD_CALL_ISA(isa, logit_backward, p, begin, end);
  });
}

}  // namespace dnkd
